"""Saved rollouts instead of an engine: a step's training, again, from the files the step left behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import TracebackType

from megatron_sr1.data import StepPrompts
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.ranks import Exchange
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_files import rollouts_file
from megatron_sr1.training.rollout_reader import read_rollouts
from megatron_sr1.training.step_rewards import all_rewards
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import NamedTensors


class SavedRollouts:
    """Implements `RolloutSource` on a run's `rollouts` folder."""

    needs_room = False

    def __init__(self, folder: Path, recorder: Recorder, ranks: Exchange) -> None:
        """`ranks`: all of the job; each reads every so many of a step's files."""
        self._folder = folder
        self._recorder = recorder
        self._ranks = ranks

    def __enter__(self) -> SavedRollouts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def take(self, prompts: StepPrompts, step: int, clock: Clock) -> StepRollouts:
        """The groups and rewards of the step, and what of them was trained on; see `read_rollouts` for errors.

        The files decide how many prompts are drawn, whatever `rollout.dynamic_sampling` says. Collective."""
        preset, num_samples = self._recorder.preset, self._recorder.num_samples
        with clock("rollout"):
            path, made_by = rollouts_file(self._folder, step), (preset.asked, preset.passes.later)
            read = read_rollouts(
                path, partial(_drawn, prompts), num_samples, all_rewards(preset), *made_by, self._ranks
            )
            ledger, tracks = self._recorder.record(read.groups, read.rewards, self._ranks)
        return StepRollouts(ledger, read.prompts, read.places, read.groups, tracks, read.skipped, read.rounds, step)

    def settle(self) -> None:
        """They are on disk."""

    def refresh(self, weights: NamedTensors, version: int) -> None:
        """Nothing is drawn, so the weights stay where they are; no rank asks for one."""


def _drawn(prompts: StepPrompts, further: int) -> StepPrompts:
    if further:
        prompts.more(further)
    return prompts
