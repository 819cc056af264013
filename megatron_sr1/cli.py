"""The command line: megatron-sr1 {sft,grpo,evaluate} CONFIG.yaml [key=value ...], megatron-sr1 sweep SWEEP.yaml,
megatron-sr1 report RUN ..."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sr1.config import (
    Config,
    check_model,
    check_trackers,
    check_train_batch,
    check_weights,
    dump_config,
    load_config,
)
from megatron_sr1.launch import add_launch_options, run_launch, slurm_ranks

TRAINING_DATA = {"sft": ("cold_start",), "grpo": ("train", "heldout"), "evaluate": ("heldout",)}
HELP = {
    "sft": "cold start: supervised fine-tuning on both response layouts",
    "grpo": "self-rewarded reinforcement learning",
    "evaluate": "evaluation of both passes on data.heldout: of model.hf_dir, or of what a run has trained",
}


class Mistake(SystemExit):
    """Ends the command with a message on stderr and exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message
        print(message, file=sys.stderr)

    def __str__(self) -> str:
        return self.message


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A mistake in the configuration or the data ends with one line and exit status 2."""
    args = _parse(arguments)
    try:
        if args.command == "report":
            _report(args.runs, args.out)
        elif args.command == "sweep":
            _sweep(args)
        elif args.command == "launch":
            sys.exit(0 if run_launch(args) else 1)
        else:
            _launch(args.command, load_config(*_sources(args)), args)
    except ValueError as error:
        raise Mistake(f"megatron-sr1 {args.command}: {error}") from error


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-sr1", description="Self-rewarded RL of vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        metavar = "CONFIG.yaml|RUN" if name == "evaluate" else "CONFIG.yaml"
        command.add_argument("config", type=Path, metavar=metavar)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=10")
        command.add_argument("--nproc", type=int, help="ranks on this machine; the same as nproc=N")
        _add_dry_run(command)
        if name == "grpo":
            _add_parts(command)
        if name == "evaluate":
            command.add_argument("--restart", action="store_true", help="remove what an earlier evaluation left first")
    _add_sweep(commands.add_parser("sweep", help="the runs of a sweep file on this machine, then their report"))
    text = "experiments of dependent tasks, and sweeps, on this machine, in containers or on Slurm, by NeMo-Run"
    add_launch_options(commands.add_parser("launch", help=text, description=text))
    report = commands.add_parser("report", help="table and HTML page of finished runs, or of a sweep")
    text = "run folders, folders that hold some, or a sweep's YAML file"
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN|SWEEP.yaml", help=text)
    report.add_argument("--out", type=Path, help="the page; default: report.html in the first folder")
    args, rest = parser.parse_known_args(arguments)
    if args.command in ("report", "sweep") or any(word.startswith("-") for word in rest):
        parser.parse_args(arguments)  # ends here where words are left that no option takes
        return args
    args.overrides += rest  # argparse takes overrides that follow an option for strangers
    if args.command == "launch":
        return args
    os.environ.update(slurm_ranks(os.environ))
    if args.nproc is not None:
        args.overrides.append(f"nproc={args.nproc}")
    if "RANK" in os.environ:  # torchrun or srun started this rank, and knows how many there are
        args.overrides.append(f"nproc={os.environ['WORLD_SIZE']}")
    return args


def _sources(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The configuration file and the overrides. For `evaluate` a run folder stands for its configuration and for the
    weights it exported; the results go to its folder `evaluate`."""
    run = args.config
    if args.command != "evaluate" or not run.is_dir():
        return run, args.overrides
    if not (run / "config.yaml").is_file() or not (run / "hf" / "config.json").is_file():
        raise ValueError(
            f"{run} is not the folder of a finished run, which holds config.yaml and hf/config.json. Let the run end, "
            "or give a configuration with model.hf_dir."
        )
    own = [f"model.hf_dir={run / 'hf'}", f"run_dir={run / 'evaluate'}", "evaluate.verify_export=0"]
    return run / "config.yaml", [*own, *args.overrides]


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time; each has the ranks that nproc says")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs of the sweep alone")
    command.add_argument("--dry-run", action="store_true", help="check everything, print the commands, stop")


def _add_dry_run(command: argparse.ArgumentParser) -> None:
    text = "check everything, print the configuration and the memory it takes on GPUs, stop; needs no GPU, no weights"
    command.add_argument("--dry-run", action="store_true", help=text)
    text = "memory of a GPU that --dry-run is to plan for (default: 80)"
    command.add_argument("--gpu-gib", type=float, default=80.0, metavar="N", help=text)
    text = "GPUs of a node that --dry-run is to plan for (default: 8)"
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help=text)


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


def _check_run(command: str, config: Config) -> list[str]:
    """What can be checked of a run without torch. Returns what keeps it from its data: a line for each key of
    TRAINING_DATA whose shards are missing.

    Raises:
        ValueError: anything else that is wrong, a key without shards included.
    """
    from megatron_sr1.data import expand_shards

    missing = []
    for name in TRAINING_DATA[command]:
        patterns = getattr(config.data, name)
        try:
            expand_shards(patterns, f"data.{name}")
        except ValueError as error:
            if not patterns:
                raise
            missing.append(str(error))
    check_model(config)
    check_trackers(config.track)
    if command == "grpo":
        check_train_batch(config)
    return missing


def _launch(command: str, config: Config, args: argparse.Namespace) -> None:
    """Checks the run, then starts its ranks."""
    missing_data = _check_run(command, config)
    parts: dict[str, Any] = {}
    if command == "grpo":
        _check_parts(args)
        parts = {"rollouts_only": args.rollouts_only, "from_rollouts": args.from_rollouts}
    if command == "evaluate":
        parts = {"restart": args.restart}
    if args.dry_run:
        _dry_run(command, config, args, missing_data)
        return
    if missing_data:
        raise ValueError(missing_data[0])
    if command == "evaluate" and config.evaluate.judge_url:
        from megatron_sr1.evaluation import judge_key

        judge_key(config.evaluate)
    only_trained = command == "sft" or (command == "grpo" and args.train_only)
    check_weights(config, weights=not (only_trained and config.model.megatron_dir))
    from megatron_sr1.platform import run_on_ranks

    run_on_ranks(_run, config.nproc, command, config, parts)


def _dry_run(command: str, config: Config, args: argparse.Namespace, missing_data: Sequence[str]) -> None:
    """Prints the configuration, and as comments below it what each rank would hold. What is printed loads again."""
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron_sr1.estimate import Machine, advice, check_fits, make_plan, plan_text

    plan = make_plan(command, config, Machine(args.gpu_gib, args.gpus_per_node))
    print(dump_config(config))
    for line in plan_text(plan, [*missing_data, *advice(plan)]).splitlines():
        print(f"# {line}".rstrip())
    check_fits(plan)


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
            from megatron_sr1.loops.evaluate import run_evaluate

            run = partial(run_evaluate, **parts)
    run(config, platform)
    if platform.is_main:
        from megatron_sr1.metrics import send_evaluations

        send_evaluations(config)


def _sweep(args: argparse.Namespace) -> None:
    """Runs what is not finished yet, then prints the tables; exits with 1 where a run failed, and with the status of a
    run that was asked to stop where this command was."""
    from megatron_sr1.sweep import STOPPED_STATUS, choose_runs, command_of, read_sweep, run_here, state_of

    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} is not allowed: it must be 1 or more.")
    sweep = read_sweep(args.sweep)
    states = {run.name: state_of(sweep, run) for run in choose_runs(sweep, args.only)}
    chosen = [run for run in sweep.runs if run.name in states]
    for run in chosen:
        for complaint in _check_run(sweep.command, sweep.config_of(run)):
            raise ValueError(f"run {run.name}: {complaint}")
    for run in chosen:
        print(f"{run.name} ({states[run.name]}): megatron-sr1 {shlex.join(command_of(sweep, run))}", flush=True)
    if args.dry_run:
        return
    due = [run for run in chosen if states[run.name] != "finished"]
    outcomes = run_here(sweep, due, args.jobs, partial(print, flush=True))
    if any(Path(run.run_dir, "metrics.jsonl").is_file() for run in sweep.runs):
        _sweep_report(args.sweep, None)
    if any(outcome.status in (None, STOPPED_STATUS) for outcome in outcomes):
        print("stopped; the same command goes on from here")
        sys.exit(STOPPED_STATUS)
    failed = [
        f"{outcome.run.name} (status {outcome.status}, see {outcome.log})" for outcome in outcomes if outcome.status
    ]
    if failed:
        sys.exit(f"megatron-sr1 sweep: failed: {', '.join(failed)}")


def _sweep_report(path: Path, out: Path | None) -> None:
    from rich.console import Console

    from megatron_sr1.report import RunGroup, print_tables, write_sweep_report
    from megatron_sr1.sweep import read_sweep

    sweep = read_sweep(path)
    groups: dict[tuple[str, str], dict[int, Path]] = {}
    for run in sweep.runs:
        groups.setdefault((run.preset, run.variant), {})[run.seed] = Path(run.run_dir)
    found = [RunGroup(preset, variant, runs) for (preset, variant), runs in groups.items()]
    folder = Path(sweep.run_dir)
    print_tables(Console(), write_sweep_report(found, folder, out))
    print(f"report: {out or folder / 'report.html'}; the numbers: {folder / 'sweep'}.{{md,csv,json}}")


def _report(runs: Sequence[Path], out: Path | None) -> None:
    from rich.console import Console

    from megatron_sr1.report import find_runs, print_table, write_report

    if runs[0].is_file():
        if len(runs) > 1:
            raise ValueError(f"{runs[0]} is a sweep's file, and stands for all its runs. Give it alone.")
        _sweep_report(runs[0], out)
        return
    page = out or runs[0] / "report.html"
    rows = write_report(find_runs(runs), page)
    print_table(Console(), rows)
    print(f"report: {page}")


if __name__ == "__main__":
    main()
