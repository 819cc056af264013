"""The viewer of runs: what each room knows of a run, put together for `megatron-sr1 report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sr1.cli.credit import tokenizer_of
from megatron_sr1.config import Config, load_config

if TYPE_CHECKING:
    from megatron_sr1.processor import Processor
    from megatron_sr1.report import ReportedRun, RunToShow, SetToShow

MOST_SAMPLES = 20_000  # of a page, unless steps are named
LEAST_STEPS = 2  # of a run all the same
NO_CONFIG = "the run's folder has no config.yaml, which names its data and its model"


def viewer_of(runs: Sequence[Path], steps: Sequence[int] | None) -> Callable[[ReportedRun, Path], RunToShow]:
    """What the page of these runs shows of each, given it and the folder where images go.

    Args:
        steps: to show; []: all that are saved; None: as many as have MOST_SAMPLES, the first and the last among them.

    Raises:
        ValueError: none of the runs has one of the steps; from the result: one of several runs that have any lacks it.
    """
    from megatron_sr1.training.rollout_files import steps_in

    if steps and not any(steps_in(run / "rollouts") for run in runs):
        raise ValueError(f"--step {steps[0]}: none of the runs has saved rollouts. Leave --step out.")
    return partial(viewed_run, steps=steps, most_samples=MOST_SAMPLES // max(1, len(runs)))


def viewed_run(
    run: ReportedRun, image_folder: Path, steps: Sequence[int] | None = None, most_samples: int = MOST_SAMPLES
) -> RunToShow:
    """See `viewer_of`.

    Raises:
        ValueError: one of the steps is not saved.
    """
    from megatron_sr1.report import RunToShow, chosen_steps, evaluation_sets, no_blocks
    from megatron_sr1.training.rollout_files import steps_in
    from megatron_sr1.training.viewed.images import DataImages, NoImages

    saved = [int(path.stem.partition("_")[2]) for path in steps_in(run.path / "rollouts")]
    path = run.path / "config.yaml"
    config = load_config(path, []) if path.is_file() else None
    size = 1 if config is None else config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    chosen = chosen_steps(saved, steps, max(LEAST_STEPS, most_samples // size), run.path)
    heldout = NoImages(NO_CONFIG) if config is None else DataImages(run.path, config.data, "heldout")
    blocks = no_blocks if config is None else _blocks(config)
    sets = evaluation_sets(run, heldout, image_folder, blocks)
    if chosen:
        sets = [*_step_sets(run, config, chosen, image_folder), *sets]
    return RunToShow(run.name, sets, tuple(step for step in saved if step not in chosen))


def _step_sets(run: ReportedRun, config: Config | None, steps: Sequence[int], image_folder: Path) -> list[SetToShow]:
    from megatron_sr1.training.viewed.configs import StepConfigs
    from megatron_sr1.training.viewed.images import DataImages, NoImages
    from megatron_sr1.training.viewed.step import StepReader

    last = max((int(entry["step"] or 0) for entry in run.metrics), default=-1)
    images = NoImages(NO_CONFIG) if config is None else DataImages(run.path, config.data, "train")
    tokenizer = NO_CONFIG if config is None else _tokenizer(run.path, config)
    told = _untrained(run.metrics)
    return StepReader(run.path, StepConfigs(run.path, last), tokenizer, images, image_folder, told).sets(steps)


def _untrained(metrics: Sequence[Mapping[str, float | None]]) -> dict[int, str]:
    """By step, what of it has moved no weight."""
    found = {}
    for entry in metrics:
        step, skipped = int(entry["step"] or 0), entry.get("skipped_updates")
        if "grad_norm" not in entry:
            found[step] = "Nothing was trained in this step: its advantages are those that training would have used."
        elif skipped:
            found[step] = f"{skipped:g} optimizer steps of it were skipped: their gradient was not finite."
    return found


def _tokenizer(run: Path, config: Config) -> Processor | str:
    """That of the model the run began with, or else of what it has exported; or why there is none."""
    try:
        return tokenizer_of(run, config, Path(config.model.hf_dir))
    except (ValueError, OSError) as error:
        if (run / "hf").is_dir():
            with suppress(ValueError, OSError):  # half written, or damaged
                return tokenizer_of(run, config, run / "hf")
        return f"{error} Until then tokens cannot be told apart, nor their advantages be computed."


def _blocks(config: Config) -> Callable[[str, str], Iterable[tuple[str, int, int]]]:
    """Finds the blocks of a response to a template, by its name."""
    from megatron_sr1.prompts import templates_of
    from megatron_sr1.streams import Preset
    from megatron_sr1.training.viewed.step import blocks_of

    templates = templates_of(config).by_name
    later = config.objective.second_template or Preset.second_template
    return lambda name, text: blocks_of(templates.get(name or later), text)
