"""Sweeps on this machine, and the reports of what is there."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from megatron_sr1.cli.runs import check_run
from megatron_sr1.cli.viewing import viewer_of
from megatron_sr1.printable import printable


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


def run_report(args: argparse.Namespace) -> None:
    """Table and page of runs, or of a sweep's file; then serves the page, where that is asked for, until Ctrl-C.

    Raises:
        ValueError: no run is there, a damaged file in one, none has the step, or the page cannot be served so.
    """
    from megatron_sr1.report import LOOPBACK, check_address

    runs, out, steps = args.runs, args.out, chosen(args.step)
    if out is not None and out.suffix != ".html":
        raise ValueError(
            f"--out {out} is not allowed: the report is a page, and replaces what is there. Name it .html."
        )
    if not args.serve and (args.port is not None or args.host is not None):
        raise ValueError("--port and --host are of the server. Add --serve, or leave them out.")
    host, port = args.host or LOOPBACK, args.port or 0
    check_address(host, port)
    if runs[0].is_file():
        if len(runs) > 1:
            raise ValueError(f"{runs[0]} is a sweep's file, and stands for all its runs. Give it alone.")
        page = _sweep_report(runs[0], out, steps)
    else:
        page = _runs_report(runs, out, steps)
    if args.serve:
        _serve(page, host, port)


def chosen(words: Sequence[str] | None) -> list[int] | None:
    """The steps that --step names; []: all; None: it is not given.

    Raises:
        ValueError: one is neither a number nor all.
    """
    if words is None or "all" in words:
        return None if words is None else []
    wrong = next((word for word in words if not word.isdecimal()), None)
    if wrong is not None:
        raise ValueError(f"--step {wrong} is not allowed: it must be a step's number, as in metrics.jsonl, or all.")
    return [int(word) for word in words]


def _runs_report(runs: Sequence[Path], out: Path | None, steps: Sequence[int] | None) -> Path:
    from rich.console import Console

    from megatron_sr1.report import find_runs, print_table, write_report

    page, found = out or runs[0] / "report.html", find_runs(runs)
    written = write_report(found, page, viewer_of(found, steps))
    print_table(Console(), written.rows)
    _print_problems(written.problems)
    print(printable(f"report: {page}"))
    return page


def _serve(page: Path, host: str, port: int) -> None:
    from megatron_sr1.report import report_server

    with report_server(page, host, port) as server:
        address, number = server.server_address[:2]
        print(printable(f"serving http://{address}:{number}/ on this machine alone; Ctrl-C ends it"), flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _sweep_report(path: Path, out: Path | None, steps: Sequence[int] | None = None) -> Path:
    from rich.console import Console

    from megatron_sr1.launch.sweep import read_sweep
    from megatron_sr1.report import RunGroup, print_tables, write_sweep_report

    sweep = read_sweep(path)
    groups: dict[tuple[str, str], dict[int, Path]] = {}
    for run in sweep.runs:
        groups.setdefault((run.preset, run.variant), {})[run.seed] = Path(run.run_dir)
    found = [RunGroup(preset, variant, runs) for (preset, variant), runs in groups.items()]
    folder = Path(sweep.run_dir)
    page, viewed = out or folder / "report.html", viewer_of([Path(run.run_dir) for run in sweep.runs], steps)
    written = write_sweep_report(found, folder, page, viewed)
    print_tables(Console(), written.rows)
    _print_problems(written.problems)
    print(printable(f"report: {page}; the numbers: {folder / 'sweep'}.{{md,csv,json}}"))
    return page


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        print(printable(f"not shown: {problem}"))
