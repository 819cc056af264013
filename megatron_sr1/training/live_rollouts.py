"""A step's rollouts from the engines, graded while they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from megatron_sr1.metrics.clock import Clock
from megatron_sr1.objective import Preset
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.training.rewards import Rewards, join_rewards, scored_components
from megatron_sr1.types import Generator, Prompt, RolloutGroup, Sampling


class LiveRollouts:
    """Generates and grades. Its worker processes live as long as its `with` block."""

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        preset: Preset,
        gather: Callable[[list[Any]], list[Any]],
    ) -> None:
        """`gather`: gives every rank the concatenation of all ranks' lists."""
        self._generator = generator
        self._sampling = sampling
        self._preset = preset
        self._gather = gather
        self._graders = Graders(scored_components(preset))

    def __enter__(self) -> LiveRollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graders.close()

    def take(self, prompts: Sequence[Prompt], step: int, clock: Clock) -> tuple[list[RolloutGroup], Rewards]:
        """All groups and all rewards on every rank. Collective.

        Each group is graded once, beside the engine that made it, so no two ranks can disagree about an answer.
        `seconds/reward` is what grading takes beyond the end of generation.
        """
        with clock("rollout"):
            groups = self._generator.generate(prompts, self._sampling, step, self._graders.submit)
        with clock("reward"):
            rewards = join_rewards(self._gather(self._graders.collect()), self._preset)
        return groups, rewards
