"""Sweeps on this machine, and the reports of what is there."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_sr1.cli.runs import check_run


def run_sweep(args: argparse.Namespace) -> None:
    """Runs what is not finished yet, then prints the tables; exits with 1 where a run failed, and with the status of a
    run that was asked to stop where this command was."""
    from megatron_sr1.launch.sweep import STOPPED_STATUS, choose_runs, command_of, read_sweep, run_here, state_of

    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} is not allowed: it must be 1 or more.")
    sweep = read_sweep(args.sweep)
    states = {run.name: state_of(sweep, run) for run in choose_runs(sweep, args.only)}
    chosen = [run for run in sweep.runs if run.name in states]
    for run in chosen:
        for complaint in check_run(sweep.command, sweep.config_of(run)):
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


def run_report(runs: Sequence[Path], out: Path | None) -> None:
    """Table and page of finished runs, or of a sweep's file.

    Raises:
        ValueError: no run is there, or a damaged file in one.
    """
    from rich.console import Console

    from megatron_sr1.report import find_runs, print_table, write_report

    if out is not None and out.suffix != ".html":
        raise ValueError(
            f"--out {out} is not allowed: the report is a page, and replaces what is there. Name it .html."
        )
    if runs[0].is_file():
        if len(runs) > 1:
            raise ValueError(f"{runs[0]} is a sweep's file, and stands for all its runs. Give it alone.")
        _sweep_report(runs[0], out)
        return
    page = out or runs[0] / "report.html"
    rows = write_report(find_runs(runs), page)
    print_table(Console(), rows)
    print(f"report: {page}")


def _sweep_report(path: Path, out: Path | None) -> None:
    from rich.console import Console

    from megatron_sr1.launch.sweep import read_sweep
    from megatron_sr1.report import RunGroup, print_tables, write_sweep_report

    sweep = read_sweep(path)
    groups: dict[tuple[str, str], dict[int, Path]] = {}
    for run in sweep.runs:
        groups.setdefault((run.preset, run.variant), {})[run.seed] = Path(run.run_dir)
    found = [RunGroup(preset, variant, runs) for (preset, variant), runs in groups.items()]
    folder = Path(sweep.run_dir)
    print_tables(Console(), write_sweep_report(found, folder, out))
    print(f"report: {out or folder / 'report.html'}; the numbers: {folder / 'sweep'}.{{md,csv,json}}")
