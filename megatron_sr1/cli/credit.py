"""What two objectives would credit of a step that a run has saved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sr1.config import PRESET_NAMES, Config, load_config, pixel_limits

if TYPE_CHECKING:
    from megatron_sr1.processor import Processor
    from megatron_sr1.report import CreditReport
    from megatron_sr1.training.credit_report import Objective

SHOWN = 24  # samples of the page


def run_credit(args: argparse.Namespace) -> None:
    """Table and page. Raises as `saved_credit`."""
    from rich.console import Console

    from megatron_sr1.report import print_credit, write_credit

    if args.out is not None and args.out.suffix != ".html":
        raise ValueError(f"--out {args.out} is not allowed: it is a page, and replaces what is there. Name it .html.")
    report = saved_credit(args.run, args.step, args.preset, args.against)
    page = args.out or args.run / "credit.html"
    write_credit(report, page)
    print_credit(Console(), report)
    print(f"report: {page}")


def saved_credit(run: Path, step: int, preset: str | None, against: str) -> CreditReport:
    """What is reported of a step of a run.

    Args:
        preset: of a first objective, or a file that changes the run's; None: the run's own.
        against: of a second.

    Raises:
        ValueError: the folder is not a run's, an objective is none or needs what the rollouts do not have, there is no
            such step, or a file is damaged.
    """
    from megatron_sr1.training.credit_report import credit_report
    from megatron_sr1.training.saved_step import SavedStep

    config = _run_config(run)
    first, second = (
        _objective(option, name, run, config, step) for option, name in (("--preset", preset), ("--against", against))
    )
    processor = tokenizer_of(run, config, Path(config.model.hf_dir))
    saved = SavedStep.read(run / "rollouts", step, processor.image_token_id)
    return credit_report(run, step, saved, (first, second), processor, SHOWN)


def _run_config(run: Path) -> Config:
    if not (run / "config.yaml").is_file() or not (run / "rollouts").is_dir():
        raise ValueError(
            f"{run} is not the folder of a GRPO run that has saved rollouts, which holds config.yaml and rollouts. "
            "Give the run_dir of megatron-sr1 grpo."
        )
    return load_config(run / "config.yaml", [])


def _objective(option: str, name: str | None, run: Path, config: Config, step: int) -> Objective:
    """The run's own where there is no name; a preset, with the other keys of the run's objective but not its streams;
    or the run's, changed by a file. With the coefficients of the step.

    Raises:
        ValueError: there is no such preset or file, or see `preset_of` and `Objective`; the option stands in front.
    """
    from megatron_sr1.streams import preset_of
    from megatron_sr1.training.credit_report import Objective

    label = name if name is not None else f"{config.objective.name}, the run's own"
    file = run / "config.yaml"
    try:
        if name in PRESET_NAMES:
            config = load_config(file, [f"objective.preset={name}", "objective.streams=[]"])
        elif name is not None:
            if not Path(name).is_file():
                raise ValueError(
                    f"neither a preset nor a file. Presets are {', '.join(PRESET_NAMES)}; a YAML file has a section "
                    "objective."
                )
            config = load_config(file, [], objective=Path(name))
        return Objective(label, preset_of(config).at(step), config)
    except ValueError as error:
        raise ValueError(f"{option} {label}: {error}") from error


def tokenizer_of(run: Path, config: Config, folder: Path) -> Processor:
    """Its tokenizer is all that is used.

    Args:
        folder: model.hf_dir, or another with the tokenizer.

    Raises:
        ValueError: it is no folder, or see `Processor.from_pretrained`.
    """
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
    from megatron_sr1.processor import Processor

    model = config.model
    if not folder.is_dir():
        raise ValueError(
            f"model.hf_dir={str(folder)!r} of {run / 'config.yaml'} is no folder, and its tokenizer is needed. Start "
            "the command where the run was started, or copy the model there."
        )
    define_missing_torchvision_ops()
    return Processor.from_pretrained(str(folder), pixels=pixel_limits(model), system_prompt=model.system_prompt)
