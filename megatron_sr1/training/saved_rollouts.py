"""Saved rollouts instead of an engine: a step's training, again, from the file the step left behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType

from megatron_sr1.data import StepPrompts
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.streams import Preset
from megatron_sr1.training.rollout_files import read_rollouts, rollouts_file
from megatron_sr1.training.step_rewards import scored_rewards
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import NamedTensors, Prompt


class SavedRollouts:
    """Implements `RolloutSource` on a run's `rollouts` folder."""

    needs_room = False

    def __init__(self, folder: Path, preset: Preset, num_samples: int) -> None:
        """`num_samples`: K of the run that saved them."""
        self._folder = folder
        self._names = scored_rewards(preset)
        self._made_by = (preset.asked, preset.passes.later)
        self._num_samples = num_samples

    def __enter__(self) -> SavedRollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def take(self, prompts: StepPrompts, step: int, clock: Clock) -> StepRollouts:
        """All groups and rewards of the step, and what of them was trained on; see `read_rollouts` for errors.

        The file decides how many prompts are drawn, whatever `rollout.dynamic_sampling` says. Collective."""
        with clock("rollout"):
            path = rollouts_file(self._folder, step)
            return read_rollouts(path, partial(_all_prompts, prompts), self._num_samples, self._names, *self._made_by)

    def settle(self) -> None:
        """They are on disk."""

    def refresh(self, weights: NamedTensors, version: int) -> None:
        """Nothing is drawn, so the weights stay where they are; no rank asks for one."""


def _all_prompts(prompts: StepPrompts, further: int) -> list[Prompt]:
    return [*prompts.first, *(prompts.more(further) if further else [])]
