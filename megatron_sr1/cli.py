"""The command line: megatron-sr1 {sft,grpo,evaluate} CONFIG.yaml [key=value ...], megatron-sr1 report RUN ..."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sr1.config import Config, check_model, check_train_batch, dump_config, load_config

TRAINING_DATA = {"sft": ("cold_start",), "grpo": ("train", "heldout"), "evaluate": ("heldout",)}
HELP = {
    "sft": "cold start: supervised fine-tuning on both response layouts",
    "grpo": "self-rewarded reinforcement learning",
    "evaluate": "greedy evaluation of both passes on the held-out shards",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A mistake in the configuration or the data ends with one line and exit status 2."""
    args = _parse(arguments)
    try:
        if args.command == "report":
            _report(args.runs, args.out)
        else:
            _launch(args.command, load_config(args.config, args.overrides), args)
    except ValueError as error:
        sys.exit(f"megatron-sr1 {args.command}: {error}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-sr1", description="Self-rewarded RL of vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, metavar="CONFIG.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=10")
        command.add_argument("--nproc", type=int, help="ranks on this machine; the same as nproc=N")
        command.add_argument("--dry-run", action="store_true", help="check everything, print the configuration, stop")
        if name == "grpo":
            _add_parts(command)
    report = commands.add_parser("report", help="table and HTML page of finished runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders that hold some")
    report.add_argument("--out", type=Path, help="the page; default: report.html in the first folder")
    args, rest = parser.parse_known_args(arguments)
    if args.command == "report" or any(word.startswith("-") for word in rest):
        parser.parse_args(arguments)  # ends here where words are left that no option takes
        return args
    args.overrides += rest  # argparse takes overrides that follow an option for strangers
    if args.nproc is not None:
        args.overrides.append(f"nproc={args.nproc}")
    if "RANK" in os.environ:  # torchrun started this rank, and knows how many there are
        args.overrides.append(f"nproc={os.environ['WORLD_SIZE']}")
    return args


def _add_parts(command: argparse.ArgumentParser) -> None:
    parts = command.add_argument_group("parts of a run, to look into a step")
    text = "generate, grade and save the rollouts of the steps; train nothing"
    parts.add_argument("--rollouts-only", action="store_true", help=text)
    parts.add_argument("--train-only", action="store_true", help="train from saved rollouts; start no engine")
    parts.add_argument("--from-rollouts", type=Path, metavar="DIR", help="the `rollouts` folder for --train-only")


def _check_parts(args: argparse.Namespace) -> None:
    if args.train_only != (args.from_rollouts is not None):
        raise ValueError("--train-only and --from-rollouts DIR go together: the first needs rollouts to train from.")
    if args.train_only and args.rollouts_only:
        raise ValueError(
            "--train-only and --rollouts-only exclude each other: one reads rollouts, the other makes them."
        )
    if args.train_only and not args.from_rollouts.is_dir():
        raise ValueError(f"--from-rollouts {args.from_rollouts}: not a folder. Give the `rollouts` folder of a run.")


def _launch(command: str, config: Config, args: argparse.Namespace) -> None:
    """Checks what can be checked without torch, then starts the ranks."""
    from megatron_sr1.data import expand_shards

    for name in TRAINING_DATA[command]:
        expand_shards(getattr(config.data, name), f"data.{name}")
    check_model(config)
    parts: dict[str, Any] = {}
    if command == "grpo":
        check_train_batch(config)
        _check_parts(args)
        parts = {"rollouts_only": args.rollouts_only, "from_rollouts": args.from_rollouts}
    if args.dry_run:
        print(dump_config(config), end="")
        return
    from megatron_sr1.platform import run_on_ranks

    run_on_ranks(_run, config.nproc, command, config, parts)


def _run(command: str, config: Config, parts: dict[str, Any]) -> None:
    """One rank. The platform comes first: Megatron-Core may be imported only after it is prepared."""
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    match command:
        case "sft":
            from megatron_sr1.loops.sft import run_sft as run
        case "grpo":
            from megatron_sr1.loops.grpo import run_grpo

            run = partial(run_grpo, **parts)
        case _:
            from megatron_sr1.loops.evaluate import run_evaluate as run
    run(config, platform)


def _report(runs: Sequence[Path], out: Path | None) -> None:
    from rich.console import Console

    from megatron_sr1.report import find_runs, print_table, write_report

    page = out or runs[0] / "report.html"
    rows = write_report(find_runs(runs), page)
    print_table(Console(), rows)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
