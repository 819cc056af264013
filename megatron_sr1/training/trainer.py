"""The optimizer steps of one rollout batch: rewards -> advantages -> packed rows -> steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.processor import Processor
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import Batcher, StreamBatch
from megatron_sr1.training.live_groups import step_advantages
from megatron_sr1.training.logprob_gap import check_logprob_gap, max_logprob_gap
from megatron_sr1.training.losses import PolicyLoss
from megatron_sr1.training.step_rewards import Rewards
from megatron_sr1.types import LogProbs, RolloutGroup, Scoring


class NoTrainer:
    """Takes the place of a `Trainer` where the policy stays as it is."""

    def update(self, groups: Sequence[RolloutGroup], rewards: Rewards) -> list[StepResult]:
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
        self._batcher = Batcher(config, processor, policy.replicas, policy.platform.device)

    def update(self, groups: Sequence[RolloutGroup], rewards: Rewards) -> list[StepResult]:
        """One optimizer step per `train.batch_size` prompts. With several, old log-probs are taken before the first.

        Raises:
            ValueError: trainer and generator are too far apart, see `check_logprob_gap`.
            RewardError: so many groups were skipped that a replica has none; before the first step.
        """
        self._policy.return_to_device()
        advantages = step_advantages(groups, rewards, self._preset, self._config.objective)
        batches = list(self._mini_batches(groups, advantages))
        old: list[list[LogProbs] | None] = [None] * len(batches)
        if len(batches) > 1:
            old = [self._policy.logprobs(batch.micro_batches, self._scoring) for batch in batches]
        results = []
        for batch, before in zip(batches, old, strict=True):
            reference = None
            if self._preset.needs_reference:
                reference = self._policy.reference_logprobs(batch.micro_batches, self._scoring)
            loss = PolicyLoss(batch, before, reference, self._preset, self._config.objective)
            results.append(self._policy.train_step(batch.micro_batches, loss, self._scoring))
            check_logprob_gap(results[-1].metrics, self._max_logprob_gap)
        return results

    def _mini_batches(self, groups: Sequence[RolloutGroup], advantages: Tensor) -> Iterator[StreamBatch]:
        """Each of the prompts of `train.batch_size`, without groups that were skipped."""
        size = self._config.train.batch_size
        samples = self._config.rollout.samples_per_prompt
        for first in range(0, self._config.rollout.prompts_per_step, size):
            start, end = (sum(group.group_id < limit for group in groups) for limit in (first, first + size))
            if end - start < self._policy.replicas.num_ranks:
                raise RewardError(
                    f"only {end - start} of {size} prompts of an optimizer step are graded, which is less than the "
                    f"{self._policy.replicas.num_ranks} replicas of the policy. See above for why."
                )
            rollouts = slice(start * samples, end * samples)
            yield self._batcher.streams(groups[start:end], advantages[:, rollouts], self._preset)
