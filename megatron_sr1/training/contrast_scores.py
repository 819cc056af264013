"""What the policy and its reference say to first passes under the contrasts, and the weights that come of it.

Shape legend: S reward streams, B responses of the optimizer step over all replicas, b of this one, R scored tokens of a
row, n response tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from megatron_sr1.objective import dependency, response_weights, token_weighting
from megatron_sr1.packing import gather_rows, scatter_rows
from megatron_sr1.policy import Policy
from megatron_sr1.ranks import Exchange
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import StreamRows
from megatron_sr1.training.contrasts import ContrastScores
from megatron_sr1.training.response_kl import over_replicas
from megatron_sr1.types import LogProbs, MicroBatch, RewardStream, Scoring

_Score = Callable[[Sequence[MicroBatch], Scoring], list[LogProbs]]


class ContrastScorer:
    """Of one preset. Everything here is collective over all ranks."""

    def __init__(self, policy: Policy, preset: Preset, scoring: Scoring) -> None:
        self._policy = policy
        self._preset = preset
        self._scoring = scoring

    def present(
        self, rows: StreamRows, *, own: bool, keeps_hidden: bool = False
    ) -> tuple[list[LogProbs], ContrastScores]:
        """Under the contrasts of the present weights, in one forward pass; with `own`, in their own context as well.

        Args:
            keeps_hidden: of whole distributions that are trained to differ, what they are made of is kept.
        """
        names = [contrast.name for contrast in self._preset.contrasts if contrast.weights == "policy"]
        kept = self._preset.full_contrasts if keeps_hidden else ()
        return self._score(self._policy.logprobs, rows, names, own=own, kept=kept)

    def reference(self, rows: StreamRows) -> tuple[list[LogProbs], ContrastScores]:
        """By the weights that the run began with: in their own context, and under the contrasts of these weights."""
        names = [contrast.name for contrast in self._preset.contrasts if contrast.weights == "reference"]
        return self._score(self._policy.reference_logprobs, rows, names, own=True)

    def _score(
        self, score: _Score, rows: StreamRows, names: Sequence[str], *, own: bool, kept: Sequence[str] = ()
    ) -> tuple[list[LogProbs], ContrastScores]:
        others = [rows.contrasts[name] for name in names]
        first = _keeping(rows.micro_batches, bool(kept)) if own else []
        theirs_too = (_keeping(rows.contrasts[name].micro_batches, name in kept) for name in names)
        wanted = [*first, *chain.from_iterable(theirs_too)]
        found = iter(score(wanted, self._scoring) if own or names else [])
        theirs = [next(found) for _ in first]
        under, there, hidden = {}, {}, {}
        for name, other in zip(names, others, strict=True):
            values = [next(found) for _ in other.micro_batches]
            place = (rows.micro_batches, rows.num_responses)
            logprobs, there[name] = other.onto_own([each.logprobs for each in values], *place)
            entropies, _ = other.onto_own([_entropy(each) for each in values], *place)
            under[name] = [LogProbs(*pair) for pair in zip(logprobs, entropies, strict=True)]
            hidden[name] = [each.hidden for each in values]
        return theirs, ContrastScores(dict.fromkeys(names, theirs if own else None), under, there, hidden)


def contrast_weights(
    rows: StreamRows, scores: ContrastScores, streams: Sequence[RewardStream], replicas: Exchange
) -> list[Tensor]:
    """What scales the advantages of each token, of each micro-batch [S, R]: 1 in a stream that does not weigh, and
    where there is nothing to compare. Collective over the replicas, which send S numbers for each of their responses.

    Args:
        scores: with log-probs in their own context, too.
    """
    number = rows.num_responses
    credited = gather_rows([tokens.token_weights != 0 for tokens in rows.tokens], rows.micro_batches, number)  # [S, n]
    weights = [torch.ones(each.shape, device=each.device) for each in credited]
    means = torch.full((number, len(streams)), -1.0, dtype=torch.float64)  # of D; -1: of no response
    for row, stream in enumerate(streams):
        if not stream.is_weighted:
            continue
        for index, (depends, there) in enumerate(_dependencies(rows, scores, stream.contrast)):
            chosen = credited[index][row] & there
            if chosen.any():
                means[index, row] = depends[chosen].double().mean().item()
                how = (stream.token_weighting, stream.token_share, stream.token_threshold)
                weights[index][row] = token_weighting(depends, chosen, *how)
    everyone = replicas.gather_rows(means)  # [B, S]
    for row, stream in enumerate(streams):
        if stream.sequence_weight_low is None:
            continue
        place = means[:, row] >= 0
        factors = torch.ones(number, dtype=torch.float64)
        factors[place] = _factors(means[place, row], everyone[:, row], stream)
        for index, factor in enumerate(factors.tolist()):
            weights[index][row] *= factor
    return scatter_rows(weights, rows.micro_batches)


def contrast_rewards(
    rows: StreamRows, scores: ContrastScores, streams: Sequence[RewardStream], number: int, replicas: Exchange
) -> Tensor:
    """[S, number] float64: what each response of the optimizer step earns by a stream's contrast,

        contrast_reward * mean (log pi(own) - log pi(contrast)) + contrast_entropy_reward * mean (H(contrast) - H(own))

    in nats, over the tokens that the stream credits and its contrast has; NaN where there are none, and in streams that
    have neither. The entropies are of whole distributions. Collective over the replicas.

    Args:
        number: places of responses, see `ResponseTokens.place`.
    """
    sums, counts = torch.zeros(2, number, len(streams), dtype=torch.float64)
    here = torch.zeros(number, dtype=torch.bool)
    for index, tokens in enumerate(rows.tokens):
        place = tokens.place.cpu()
        here[place] = True
        for row, stream in enumerate(streams):
            if not stream.earns_by_contrast:
                continue
            own, there = scores.own[stream.contrast], scores.there[stream.contrast][index]
            assert own is not None, "a reward needs the log-probs in their own context before the step"
            chosen = ((tokens.token_weights[row] != 0) & there).cpu()
            gap, surer = (each.cpu().double() for each in scores.gaps(stream.contrast, index, own[index]))
            earned = stream.contrast_reward * gap + stream.contrast_entropy_reward * surer
            sums[:, row].index_add_(0, place[chosen], earned[chosen])
            counts[:, row].index_add_(0, place[chosen], torch.ones_like(earned[chosen]))
    sums, counts = over_replicas(torch.cat([sums, counts], 1), here, replicas).t().chunk(2)
    return sums / counts  # 0 / 0 is NaN


def _keeping(batches: Sequence[MicroBatch], keeps: bool) -> list[MicroBatch]:
    return [replace(batch, keeps_hidden=keeps) for batch in batches]


def _entropy(scores: LogProbs) -> Tensor:
    assert scores.entropy is not None, "the policy's head gives it"
    return scores.entropy


def of_siblings(earned: Tensor) -> Tensor:
    """[..., K] with what is NaN replaced by the mean of the others, or 0 where there is none: a response that has no
    other context neither gains nor loses by that."""
    known = ~earned.isnan()
    mean = earned.nan_to_num().sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(known, earned, mean)


def _factors(own: Tensor, everyone: Tensor, stream: RewardStream) -> Tensor:
    """[b] of this replica's responses among all: a response with the same mean has the same weight, whoever has it."""
    known = everyone[everyone >= 0].sort().values
    assert stream.sequence_weight_low is not None
    weights = response_weights(known, stream.sequence_weight_low, stream.sequence_weight_for)
    return weights[torch.searchsorted(known, own)]


def _dependencies(rows: StreamRows, scores: ContrastScores, name: str) -> list[tuple[Tensor, Tensor]]:
    """[n] of each response, and whether the contrast has the tokens."""
    own, there = scores.own[name], scores.there[name]
    assert own is not None, "weights need the log-probs in their own context of the same moment"
    pairs = zip(own, scores.under[name], there, strict=True)
    depends = [dependency(mine.logprobs, other.logprobs).masked_fill(~has, 0.0) for mine, other, has in pairs]
    of_responses = (gather_rows(values, rows.micro_batches, rows.num_responses) for values in (depends, there))
    return list(zip(*of_responses, strict=True))
