"""The optimizer steps of one rollout batch: rewards -> advantages -> packed rows -> steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.processor import Processor
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import Batcher, StreamRows
from megatron_sr1.training.contrast_scores import ContrastScorer, contrast_weights
from megatron_sr1.training.contrast_terms import ContrastTerms, with_means
from megatron_sr1.training.contrasts import ContrastScores
from megatron_sr1.training.ledger import StepLedger, slots_of
from megatron_sr1.training.live_groups import step_advantages
from megatron_sr1.training.logprob_gap import check_logprob_gap, max_logprob_gap
from megatron_sr1.training.losses import PolicyLoss
from megatron_sr1.training.payload import Payload, share_responses
from megatron_sr1.training.response_kl import response_kl
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import LogProbs, Scoring


class NoTrainer:
    """Takes the place of a `Trainer` where the policy stays as it is."""

    def update(self, rollouts: StepRollouts) -> list[StepResult]:
        """No step."""
        return []


class Trainer:
    """Trains a policy on scored rollouts."""

    def __init__(self, config: Config, policy: Policy, preset: Preset, processor: Processor) -> None:
        """
        Raises:
            ConfigError: see `Batcher`.
        """
        self._config = config
        self._policy = policy
        self._preset = preset
        self._scoring = Scoring(config.rollout.temperature, processor.media_ids)
        self._max_logprob_gap = max_logprob_gap(config, policy.platform.on_cpu)
        self._contrasts = ContrastScorer(policy, preset, self._scoring)
        self._batcher = Batcher(config, processor, policy.replicas, policy.platform.device)
        ranks, self._replica = policy.platform.ranks, policy.replicas.rank
        self._payload = Payload(ranks, ranks.gather([self._replica]))

    def update(self, rollouts: StepRollouts) -> list[StepResult]:
        """One optimizer step per `train.batch_size` prompts. With several, old log-probs are taken before the first, or
        are the generator's; where a KL is in the reward, old and reference log-probs are taken, before the advantages.

        Raises:
            ValueError: trainer and generator are too far apart, see `check_logprob_gap`.
            RewardError: so many groups were skipped that a replica has none; before the first step.
        """
        self._policy.return_to_device()
        ledger, places = rollouts.trained
        shares = list(self._shares(places))
        rows = [self._rows(ledger.of(share), rollouts) for share in shares]
        old: list[list[LogProbs]] = []
        reference: list[tuple[list[LogProbs], ContrastScores]] = []
        whose = self._config.objective.old
        needs_old = whose == "generator" or (whose == "trainer" and len(shares) > 1)
        drawn = [self._contrasts.present(row, own=True) for row in rows] if self._preset.weighs_contrast else []
        if needs_old or self._preset.kl_in_reward:
            old = (
                [scores for scores, _ in drawn] if drawn and whose == "trainer" else [self._drawn(row) for row in rows]
            )
        kl = None
        if self._preset.kl_in_reward:
            reference = [self._contrasts.reference(row) for row in rows]
            held = [scores for scores, _ in reference]
            kls = [self._kl(*each) for each in zip(shares, rows, old, held, strict=True)]
            kl = torch.cat(kls, 1)  # [S, B, M]
        advantages = step_advantages(ledger, self._preset, self._config.objective, kl)
        results = []
        for number, share in enumerate(shares):
            row = rows[number]
            its_reference = reference[number] if reference else self._reference(row)
            scores = self._under(row, drawn[number][1] if drawn else None, its_reference, is_first=number == 0)
            weights = None
            if drawn:
                by = drawn[number][1] if its_reference is None else drawn[number][1].joined(its_reference[1])
                weights = contrast_weights(row, by, self._preset.streams, self._policy.replicas)
            batch = self._batcher.streams(row, advantages[:, self._rollouts(share)], self._preset, weights)
            before = old[number] if needs_old else None  # of the only step the policy's present ones
            same = number == 0 or whose == "trainer"
            terms = None if scores is None else ContrastTerms(batch, scores, self._preset)
            their = (before, None if its_reference is None else its_reference[0], self._preset, self._config.objective)
            loss = PolicyLoss(batch, *their, measures_gap=same, contrast=terms)
            more = [] if terms is None else terms.micro_batches
            result = with_means(self._policy.train_step([*batch.micro_batches, *more], loss, self._scoring))
            results.append(result if kl is None else self._with_penalties(result, kl[:, self._rollouts(share)]))
            if same:
                check_logprob_gap(result.metrics, self._max_logprob_gap)
        return results

    def _under(
        self,
        rows: StreamRows,
        drawn: ContrastScores | None,
        reference: tuple[list[LogProbs], ContrastScores] | None,
        *,
        is_first: bool,
    ) -> ContrastScores | None:
        """Every contrast, by the weights that the step begins with; None where there is none.

        Args:
            drawn: by the weights that drew the responses, where that is known.
        """
        if not self._preset.contrasts:
            return None
        trains = any(stream.trains_contrast for stream in self._preset.streams)
        if drawn is None or (trains and not is_first):
            _, drawn = self._contrasts.present(rows, own=False)
        return drawn if reference is None else drawn.joined(reference[1])

    def _rows(self, ledger: StepLedger, rollouts: StepRollouts) -> StreamRows:
        """This replica's share of the groups of an optimizer step. Collective."""
        replicas, once = self._policy.replicas.num_ranks, self._batcher.share_prefix
        shares = share_responses(ledger, slots_of(self._preset), replicas, share_prefix=once)
        tracks = self._payload.fetch(ledger, shares, rollouts.tracks)
        return self._batcher.rows(ledger, shares[self._replica], tracks, rollouts.prompts, self._preset, rollouts.step)

    def _drawn(self, rows: StreamRows) -> list[LogProbs]:
        """Per micro-batch, of the weights that drew the responses: the policy's, before it is trained, or those that
        the generator had."""
        if self._config.objective.old == "trainer":
            return self._policy.logprobs(rows.micro_batches, self._scoring)
        return [LogProbs(tokens.generator_logprobs, None) for tokens in rows.tokens]

    def _reference(self, rows: StreamRows) -> tuple[list[LogProbs], ContrastScores] | None:
        """None where no stream is held to it, and no contrast is scored by it."""
        return self._contrasts.reference(rows) if self._preset.needs_reference else None

    def _kl(self, share: slice, rows: StreamRows, old: list[LogProbs], reference: list[LogProbs]) -> Tensor:
        """[S, b, M] of the b rollouts of an optimizer step."""
        rollouts, most = self._rollouts(share), self._preset.most_samples
        number = (rollouts.stop - rollouts.start) * most
        kl = response_kl(rows, old, reference, self._preset.streams, number, self._policy.replicas)
        return kl.view(len(kl), -1, most)

    def _with_penalties(self, result: StepResult, kl: Tensor) -> StepResult:
        """`loss/<s>/kl_in_reward`: what was taken off the reward of a response, mean over the step.

        Args:
            kl: [S, b, M] nats.
        """
        means = [
            row[:, : self._preset.num_samples(stream.trajectory)].mean().item()
            for row, stream in zip(kl, self._preset.streams, strict=True)
        ]
        pairs = zip(self._preset.streams, means, strict=True)
        taken = {
            f"loss/{stream.name}/kl_in_reward": stream.kl_coef * mean
            for stream, mean in pairs
            if stream.kl_in == "reward"
        }
        return replace(result, metrics={**result.metrics, **taken})

    def _rollouts(self, share: slice) -> slice:
        """Of the groups, which are whole."""
        return slice(self._num_samples(share.start), self._num_samples(share.stop))

    def _num_samples(self, num_groups: int) -> int:
        return num_groups * self._config.rollout.samples_per_prompt

    def _shares(self, places: Sequence[int]) -> Iterator[slice]:
        """Which groups each optimizer step trains on: those of the prompts of `train.batch_size`, but for groups that
        were skipped.

        Args:
            places: in the training batch, increasing.
        """
        size = self._config.train.batch_size
        for first in range(0, self._config.rollout.prompts_per_step, size):
            start, end = (bisect_left(places, limit) for limit in (first, first + size))
            if self._num_samples(end - start) < self._policy.replicas.num_ranks:
                raise RewardError(
                    f"only {end - start} of {size} prompts of an optimizer step are graded, which have fewer samples "
                    f"than the policy has replicas, {self._policy.replicas.num_ranks}. See above for why."
                )
            yield slice(start, end)
