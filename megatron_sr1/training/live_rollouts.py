"""A step's rollouts from the engines, graded while they are made, and kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from megatron_sr1.metrics.clock import Clock
from megatron_sr1.objective import Preset
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.training.rollout_files import rollouts_file, write_rollouts
from megatron_sr1.training.step_rewards import Rewards, join_rewards, scored_components
from megatron_sr1.types import Generator, NamedTensors, Prompt, Ranks, RolloutGroup, Sampling


class LiveRollouts:
    """Implements `RolloutSource` on a generator. Its worker processes live as long as its `with` block."""

    needs_room = True

    def __init__(
        self,
        generator: Generator,
        sampling: Sampling,
        preset: Preset,
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
            rewards = join_rewards(self._ranks.gather(self._graders.collect()), self._preset)
        if self._ranks.rank == 0:
            write_rollouts(rollouts_file(self._folder, step), groups, rewards)
        if self._refreshed:
            self._generator.sleep()
        return groups, rewards

    def refresh(self, weights: NamedTensors, version: int) -> None:
        """Streams the weights into the engines, and wakes them where they sleep. Collective."""
        self._generator.update_weights(weights, version)
