"""Checks everything on a machine with a card, in at most 25 minutes on one H100, and writes one result.

    make gpu-check                                    # or: python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --only fp8 trace   # these alone
    python -m benchmarks.gpu_check --list

It goes on after failures. `<out>/<date>-<card>.md` and `.json` are written anew after each check, so that they hold
what is known however it ends; logs, traces and runs are in runs/gpu_check until the next call. Without a card, what
needs one is reported as absent and the rest runs on the CPU.

Exit status: 0 where everything passed or was absent, 130 after Ctrl-C, else 1.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.checks import BUDGET_S, CHECKS, MODEL
from benchmarks.gpu_check.private import REPOSITORY
from benchmarks.gpu_check.result import Result, free_stem
from benchmarks.gpu_check.runner import Budget, Check, Outcome, run_checks
from megatron_sr1.file_lock import lock_file

WORK = REPOSITORY / "runs" / "gpu_check"
STOPPED = 130  # 128 + SIGINT, as a shell has it


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS, work: Path = WORK) -> int:
    """The exit status."""
    args = _parse(arguments, checks)
    if args.list:
        for check in checks:
            print(f"{check.name:12} {check.limit_s:5.0f} s  {check.what}")
        return 0
    work.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(work.with_name(f"{work.name}.lock")) as held:
        if not held:
            print("another gpu-check is at work in this checkout. Wait for it, or stop it.", file=sys.stderr)
            return 1
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            return _run(args, checks, work)
        finally:
            shutil.rmtree(work / MODEL, ignore_errors=True)  # gigabytes on a card


def _run(args: argparse.Namespace, checks: Sequence[Check], work: Path) -> int:
    wanted = [check for check in checks if not args.only or check.name in {"environment", *args.only}]
    budget, day = Budget(60 * args.minutes), datetime.date.today().isoformat()
    stems: list[Path] = []
    told: set[str] = set()

    def after_each(outcomes: Sequence[Outcome]) -> None:
        result = Result(day, args.only, budget.seconds, budget.used, outcomes)
        if not stems:  # the card is known after the first check
            stems.append(free_stem(args.out, day, str(result.environment.get("cards", "unknown"))))
        result.write(stems[0])
        for outcome in outcomes:
            if outcome.check.name in told or (outcome.status == "not run" and not outcome.reason.startswith("budget")):
                continue
            told.add(outcome.check.name)
            why = f"  {outcome.reason}" if outcome.reason else ""
            print(f"{outcome.check.name:12} {outcome.status:12} {outcome.seconds:4.0f} s{why}", flush=True)

    outcomes, stopped = run_checks(wanted, work, budget, _has_cuda, after_each)
    print(f"result: {stems[0].name}.md and .json in {args.out}; logs: {work}")
    if stopped:
        return STOPPED
    return 0 if Result(day, args.only, budget.seconds, budget.used, outcomes).is_fine else 1


def _has_cuda(outcomes: Sequence[Outcome]) -> bool | None:
    """What the check `environment` found; None where it does not know."""
    for outcome in outcomes:
        if outcome.check.name == "environment" and "CUDA devices" in outcome.report.figures:
            return bool(outcome.report.figures["CUDA devices"])
    return None


def _parse(arguments: Sequence[str] | None, checks: Sequence[Check]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.name for check in checks]
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results", help="the result's folder")
    parser.add_argument("--minutes", type=float, default=BUDGET_S / 60, help="for everything together")
    parser.add_argument("--list", action="store_true", help="the checks and their limits")
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: it must be greater than 0.")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: it is a file. Give a folder.")
    return args


if __name__ == "__main__":
    sys.exit(main())
