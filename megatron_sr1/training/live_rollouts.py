"""A step's rollouts from the engines, graded while they are made, and kept in a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from megatron_sr1.config import RewardsConfig
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.rewards import RewardError, Ungraded
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.streams import Preset
from megatron_sr1.training.rollout_files import rollouts_file, write_rollouts
from megatron_sr1.training.step_rewards import Rewards, join_rewards, scored_rewards
from megatron_sr1.types import Generator, NamedTensors, Prompt, Ranks, RolloutGroup, Sampling

logger = logging.getLogger(__name__)


def _joined(reasons: Sequence[str]) -> str:
    more = f" ({len(reasons) - 1} groups more failed.)" if len(reasons) > 1 else ""
    return f"{reasons[0]}{more}"


class LiveRollouts:
    """Implements `RolloutSource` on a generator. Its worker processes live as long as its `with` block."""

    needs_room = True

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        preset: Preset,
        rewards: RewardsConfig,
        ranks: Ranks,
        folder: Path,
        *,
        refreshed: bool = True,
    ) -> None:
        """
        Args:
            ranks: all ranks of the job; the first of them keeps the files.
            folder: of the files, one for each step.
            refreshed: weights come after every step, and until then the engines give their memory to the trainer.
        """
        self._generator = generator
        self._sampling = sampling
        self._preset = preset
        self._ranks = ranks
        self._folder = folder
        self._refreshed = refreshed
        self._skips = rewards.on_error == "skip_group"
        self._graders = Graders(
            scored_rewards(preset),
            rewards.seconds,
            rewards.workers,
            judge=rewards.judge.endpoint if rewards.judge.url else None,
            fails_fast=not self._skips,
            asked=preset.asked,
        )

    def __enter__(self) -> LiveRollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graders.close()

    def take(self, prompts: Sequence[Prompt], step: int, clock: Clock) -> tuple[list[RolloutGroup], Rewards]:
        """All groups and all rewards on every rank, without those groups that could not be graded and are skipped.
        Collective.

        Each group is graded once, beside the engine that made it, so no two ranks can disagree about an answer.
        `seconds/reward` is what grading takes beyond the end of generation.

        Raises:
            RewardError: on every rank, of the first group that could not be graded; the engines sleep by then.
        """
        with clock("rollout"):
            groups = self._generator.generate(prompts, self._sampling, step, self._graders.submit)
        with clock("reward"):
            graded = self._ranks.gather(self._graders.collect())
        if self._refreshed:
            self._generator.sleep()
        by_group = sorted(dict(graded).items())
        skipped = {number: share.reason for number, share in by_group if isinstance(share, Ungraded)}
        if skipped and not self._skips:
            raise RewardError(_joined(list(skipped.values())))
        kept = [group for group in groups if group.group_id not in skipped]
        vectors = [(number, share) for number, share in by_group if not isinstance(share, Ungraded)]
        if not kept:
            raise RewardError(f"no group of step {step} could be graded. {_joined(list(skipped.values()))}")
        rewards = join_rewards(vectors, self._preset)
        if self._ranks.rank == 0:
            for reason in skipped.values():
                logger.warning("a group is skipped: %s", reason)
            write_rollouts(rollouts_file(self._folder, step), kept, rewards, skipped, self._preset.asked)
        return kept, rewards

    def refresh(self, weights: NamedTensors, version: int) -> None:
        """Streams the weights into the engines, and wakes them where they sleep. Collective."""
        self._generator.update_weights(weights, version)
