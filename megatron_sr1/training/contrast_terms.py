"""What contrasts add to the loss and the metrics of one optimizer step.

    L += sum_s  - gamma_s * sum_r w[s,r] * D(own[r], under[r])  -  eta_s * sum_r w[s,r] * H(under[r])

with D of `objective.contrast` and H the entropy under the contrast: PAPO (arXiv 2507.06448; its entropy terms are
`entropy_coef` and `contrast_entropy_coef` below 0). The gradient goes through both contexts. The own rows come first
and find under[r] of a pass without gradient by the same weights; then the rows under the contrasts are trained and find
own[r] as the own rows have left it. So each row has its part of the gradient, and no pair needs to share a row.
With contrast_divergence full, D is the KL of whole distributions, which the head makes of each row's hidden states and
those of the other context, of a pass without gradient (`contrast_hidden.py`).

Shape legend: S reward streams, E measured segments, R scored tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from megatron_sr1.objective import divergence
from megatron_sr1.policy import StepResult
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import StreamBatch
from megatron_sr1.training.contrast_hidden import others_of_contrast, others_of_own
from megatron_sr1.training.contrasts import ContrastScores
from megatron_sr1.types import LogProbs, MicroBatch

Metrics = dict[str, Tensor]
_TOKENS = "contrast_tokens/"  # by segment, until the means are taken
_ENTROPY = "entropy_gap"  # beside the segments


class ContrastTerms:
    """Of one optimizer step; micro-batches are scored in order, the own ones first."""

    def __init__(self, batch: StreamBatch, scores: ContrastScores, preset: Preset) -> None:
        self._batch = batch
        self._scores = scores
        self._preset = preset
        self._left: list[Tensor] = []  # the own rows' log-probs, as they were trained
        self.own_batches = self._compared_with_contrasts()  # those of the batch, with what they are compared with
        _ = self._rows
        self._scores = scores.without_hidden()  # the rows have it now

    def _compared_with_contrasts(self) -> list[MicroBatch]:
        batch = self._batch
        others = []
        for name in self._preset.full_contrasts:
            contrast, pairs = batch.contrasts[name], zip(batch.tokens, self._scores.there[name], strict=True)
            wanted = [self._compared(name, tokens.token_weights) & there for tokens, there in pairs]
            place = (batch.micro_batches, batch.num_responses)
            others.append(others_of_own(contrast, self._scores.hidden[name], wanted, *place))
        return [
            replace(row, others=tuple(each[index] for each in others if each[index] is not None))
            for index, row in enumerate(batch.micro_batches)
        ]

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """To be trained behind the own ones."""
        return [row for name in self._preset.trained_contrasts for row, _ in self._rows[name]]

    @cached_property
    def _rows(self) -> dict[str, list[tuple[MicroBatch, Tensor]]]:
        """Of each contrast that is trained: its rows, and their token weights [S, R], 0 in streams of others."""
        found = {}
        for name in self._preset.trained_contrasts:
            rows, batch = self._batch.contrasts[name], self._batch
            weights = [tokens.token_weights for tokens in batch.tokens]
            theirs = rows.from_own(weights, batch.micro_batches, batch.num_responses)
            users = [stream.contrast == name and stream.trains_contrast for stream in self._preset.streams]
            chosen = [weight * torch.tensor(users, device=weight.device)[:, None] for weight in theirs]
            has_bonus = any(
                stream.contrast == name and stream.contrast_entropy_coef != 0 for stream in self._preset.streams
            )
            batches = self._compared_with_own(name, chosen)
            found[name] = [
                (replace(row, grad_rows=torch.nonzero(weight.any(0)).squeeze(1), entropy_grad=has_bonus), weight)
                for row, weight in zip(batches, chosen, strict=True)
            ]
        return found

    def _compared_with_own(self, name: str, weights: list[Tensor]) -> list[MicroBatch]:
        """The contrast's rows, with their own context where whole distributions are compared."""
        rows, batch = self._batch.contrasts[name], self._batch
        if name not in self._preset.full_contrasts:
            return rows.micro_batches
        own = self._scores.own[name]
        assert own is not None, "whole distributions are those of one pass"
        wanted = [self._compared(name, weight) for weight in weights]
        place = (batch.micro_batches, batch.num_responses)
        others = others_of_contrast(rows, [each.hidden for each in own], wanted, *place)
        return [
            replace(row, others=() if other is None else (other,))
            for row, other in zip(rows.micro_batches, others, strict=True)
        ]

    def _compared(self, name: str, weights: Tensor) -> Tensor:
        """[R] whether a stream that compares whole distributions under the contrast has the token.

        Args:
            weights: [S, R].
        """
        users = [stream.contrast == name and stream.compares_distributions for stream in self._preset.streams]
        return (weights[torch.tensor(users, device=weights.device)] != 0).any(0)

    def own(self, index: int, scored: LogProbs) -> tuple[Tensor, Metrics]:
        """Of own micro-batch `index`: what its loss is more by, and sums of metrics.

        Args:
            scored: [R], with the gradient.
        """
        assert index == len(self._left), "own rows come in order, each once"
        trainer = scored.logprobs
        self._left.append(trainer.detach())
        loss, metrics = trainer.new_zeros(()), self._sums(index, scored)
        for row, stream in enumerate(self._preset.streams):
            if stream.trains_contrast:
                weight = self._batch.tokens[index].token_weights[row] * self._scores.there[stream.contrast][index]
                if stream.compares_distributions:
                    far = _weighed_kl(weight, scored, self._preset.full_contrasts.index(stream.contrast))
                else:
                    far = _weighed(weight, trainer, self._scores.under[stream.contrast][index].logprobs)
                loss = loss - stream.contrast_coef * far
                metrics[f"loss/{stream.name}/contrast"] = far.detach()
                metrics[f"loss/{stream.name}/contrast_entropy"] = trainer.new_zeros(())
        return loss, metrics

    def other(self, number: int, scored: LogProbs) -> tuple[Tensor, Metrics]:
        """The same of micro-batch `number` of those under contrasts, with what it adds to the metrics of `own`, where
        the divergence has its value; here it has its gradient alone."""
        name, place = self._places[number]
        weight = self._rows[name][place][1]  # [S, R]
        own = self._from_own[name][place]  # [R]
        under, entropy = scored.logprobs, scored.entropy
        loss, metrics = under.new_zeros(()), {}
        for row, stream in enumerate(self._preset.streams):
            if not stream.trains_contrast or stream.contrast != name:
                continue
            if stream.compares_distributions:
                far = _weighed_kl(weight[row], scored, 0)
            else:
                far = _weighed(weight[row], own, under)
            loss = loss - stream.contrast_coef * (far - far.detach())
            if entropy is not None:
                bonus = (weight[row] * entropy).masked_fill(weight[row] == 0, 0.0).sum()
                loss = loss - stream.contrast_entropy_coef * bonus
                metrics[f"loss/{stream.name}/contrast_entropy"] = bonus.detach()
        return loss, metrics

    @cached_property
    def _places(self) -> list[tuple[str, int]]:
        return [(name, place) for name, rows in self._rows.items() for place in range(len(rows))]

    @cached_property
    def _from_own(self) -> dict[str, list[Tensor]]:
        batch = self._batch
        return {
            name: batch.contrasts[name].from_own(self._left, batch.micro_batches, batch.num_responses)
            for name in self._preset.trained_contrasts
        }

    def gaps(self, index: int, trainer: LogProbs) -> dict[str, tuple[Tensor, Tensor]]:
        """Of own micro-batch `index`, by contrast: how much likelier each token is in its own context, [R] nats, and
        [R] bool whether the contrast has it."""
        scores = self._scores
        return {
            contrast.name: (scores.gaps(contrast.name, index, trainer)[0], scores.there[contrast.name][index])
            for contrast in self._preset.contrasts
        }

    def _sums(self, index: int, trainer: LogProbs) -> Metrics:
        """Of gaps, by contrast and segment, and of the tokens that they are of; of entropies' gaps over all tokens."""
        found: Metrics = {}
        for contrast in self._preset.contrasts:
            there = self._scores.there[contrast.name][index]
            gap, surer = self._scores.gaps(contrast.name, index, trainer)
            parts = list(zip(self._preset.measured, self._batch.tokens[index].segments, strict=True))
            for part, mask, value in (*((name, mask, gap) for name, mask in parts), (_ENTROPY, there, surer)):
                name = f"{contrast.name}/{part}"
                found[f"dependency/{name}"] = (value * mask).sum()
                found[_TOKENS + name] = (mask & there).sum().to(gap.dtype)
        return found


def _weighed(weight: Tensor, own: Tensor, under: Tensor) -> Tensor:
    """sum w D; what has no weight is no part of it, whatever its log-probs are, nor of the gradient."""
    own, under = (torch.where(weight != 0, each, 0.0) for each in (own, under))
    return (weight * divergence(own, under)).sum()


def _weighed_kl(weight: Tensor, scored: LogProbs, place: int) -> Tensor:
    """sum w KL of the other context at that place; what has no weight is no part of it."""
    assert scored.kl is not None, "the head makes it"
    return (weight * scored.kl[place].masked_fill(weight == 0, 0.0)).sum()


def with_means(result: StepResult) -> StepResult:
    """`dependency/<contrast>/<segment>` as the mean gap over the tokens, nats, and `.../entropy_gap` as that of the
    entropies; none where there are no tokens."""
    counts = {name.removeprefix(_TOKENS): v for name, v in result.metrics.items() if name.startswith(_TOKENS)}
    means = {
        f"dependency/{name}": result.metrics[f"dependency/{name}"] / count for name, count in counts.items() if count
    }
    plain: Mapping[str, float] = {
        name: value for name, value in result.metrics.items() if not name.startswith((_TOKENS, "dependency/"))
    }
    return replace(result, metrics={**plain, **means})
