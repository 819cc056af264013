"""Runs that have saved a step, made by hand, for the tests of `megatron-sr1 credit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.cli.credit import saved_credit
from megatron_sr1.config import Config, dump_config, load_config
from megatron_sr1.processor import Processor
from megatron_sr1.report import CreditReport
from megatron_sr1.streams import Preset, preset_of
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_files import rollouts_file, write_rollouts
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Rollout, RolloutGroup, RolloutPair
from tests.batch_cases import two_groups
from tests.step_cases import rollouts_of


@dataclass(frozen=True)
class SavedRun:
    """A run folder with one step, and what its trainer has had."""

    folder: Path
    config: Config
    preset: Preset
    rollouts: StepRollouts

    def credit(self, against: str, preset: str | None = None, step: int = 0) -> CreditReport:
        return saved_credit(self.folder, step, preset, against)

    def objective(self, text: str) -> str:
        """The path of a file with a section `objective`."""
        path = self.folder / f"objective-{len(list(self.folder.glob('objective-*')))}.yaml"
        path.write_text(f"objective: {text}\n")
        return str(path)


class Saver:
    """Makes runs of one model."""

    def __init__(self, folder: Path, hf_dir: str) -> None:
        self.folder, self.hf_dir = folder, hf_dir
        self.processor = Processor.from_pretrained(hf_dir)

    def save(
        self,
        *overrides: str,
        rewards: Mapping[str, Tensor] | None = None,
        groups: Sequence[RolloutGroup] | None = None,
        **changes: Any,
    ) -> SavedRun:
        """Of the two groups of `batch_cases`, or of others.

        Args:
            rewards: those that are not named are 0; None: as they are graded.
            changes: of the `StepRollouts` that is written.
        """
        groups = two_groups(self.processor) if groups is None else groups
        fixed = [f"model.hf_dir={self.hf_dir}", f"run_dir={self.folder}", "objective.kl_coef=0"]
        sizes = [f"rollout.prompts_per_step={len(groups)}", f"rollout.samples_per_prompt={len(groups[0].pairs)}"]
        config = load_config(None, [*fixed, *sizes, f"train.batch_size={len(groups)}", *overrides])
        preset = preset_of(config)
        recorder = Recorder.of(preset, len(groups[0].pairs), self.processor, config.objective.cut_responses)
        rollouts = replace(rollouts_of(groups, rewards, preset, recorder), **changes)
        made = SavedRun(self.folder, config, preset, rollouts)
        write(made)
        (self.folder / "config.yaml").write_text(dump_config(config))
        return made

    def lengths(self, groups: Sequence[RolloutGroup], second: bool = False) -> Tensor:
        """[B] response tokens of one pass; 0 where it is not there."""
        found = [pair.second if second else pair.first for group in groups for pair in group.pairs]
        return torch.tensor([0 if one is None else len(one.response_ids) for one in found], dtype=torch.float64)


def write(run: SavedRun, rank: int = 0, step: int = 0, num_prompts: int | None = None) -> None:
    """The part that a rank holds."""
    count = run.config.rollout.prompts_per_step if num_prompts is None else num_prompts
    path, made_by = rollouts_file(run.folder / "rollouts", step), (run.preset.asked, run.preset.passes.later)
    write_rollouts(path, run.rollouts, count, *made_by, rank)


def with_text(processor: Processor, pair: RolloutPair, text: str, **changes: Any) -> RolloutPair:
    """The pair whose first response is another text."""
    ids = processor.response_ids(text)
    first: Rollout = replace(pair.first, response_ids=ids, response_text=text, generator_logprobs=(-0.1,) * len(ids))
    return replace(pair, first=replace(first, **changes))
