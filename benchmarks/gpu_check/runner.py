"""Runs checks one after another, each in a process of its own, within a limit each and a budget for all.

Every check ends as one of STATUSES, whatever it does; what is known is handed on after each of them.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, get_args

from benchmarks.gpu_check.private import REPOSITORY
from benchmarks.gpu_check.processes import run_limited
from benchmarks.gpu_check.report import Report

Status = Literal["passed", "failed", "absent", "out of time", "not run"]
STATUSES: tuple[Status, ...] = get_args(Status)
ABSENT_STATUS = 77  # of a process whose check cannot be made here, as in automake's tests
TAIL_LINES = 15  # of the log of a check that did not pass
NO_CUDA = "no CUDA device"


@dataclass(frozen=True)
class Check:
    """What to run. Its process gets --report FILE and --folder FOLDER, its own, behind `command`."""

    name: str
    what: str  # a line for whoever reads the result
    command: Sequence[str]
    limit_s: float
    needs_cuda: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a check ended."""

    check: Check
    status: Status
    seconds: float = 0.0
    reason: str = ""  # of any status but passed
    report: Report = field(default_factory=Report)
    tail: str = ""  # the last lines it printed, where it did not pass


@dataclass
class Budget:
    """Seconds for all checks together, from now on."""

    seconds: float

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    @property
    def used(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        return self.seconds - self.used


class Stopped(Exception):
    """Ctrl-C, or a request to end."""


def run_checks(
    checks: Sequence[Check],
    work: Path,
    budget: Budget,
    has_cuda: Callable[[Sequence[Outcome]], bool | None],
    after_each: Callable[[Sequence[Outcome]], None],
) -> tuple[list[Outcome], bool]:
    """All outcomes in the order of the checks, and whether it was stopped before the end.

    Args:
        work: each check has the folder of its name in it, which it finds empty.
        has_cuda: what is known of it from the outcomes so far; None: nothing, and then checks that need it are tried.
        after_each: is given the outcomes so far, those that were not run yet included.
    """
    done: list[Outcome] = []
    reason = "it was stopped before"
    with _stop_signals():
        try:
            for check in checks:
                done.append(_outcome(check, work, budget, has_cuda(done)))
                after_each([*done, *_not_run(checks[len(done) :], "its turn has not come yet")])
        except Stopped:
            rest = _not_run(checks[len(done) :], reason)
            after_each([*done, *rest])
            return [*done, *rest], True
    return done, False


def _not_run(checks: Sequence[Check], reason: str) -> list[Outcome]:
    return [Outcome(check, "not run", reason=reason) for check in checks]


def _outcome(check: Check, work: Path, budget: Budget, has_cuda: bool | None) -> Outcome:
    if check.needs_cuda and has_cuda is False:
        return Outcome(check, "absent", reason=NO_CUDA)
    if budget.left <= 0:
        return Outcome(check, "not run", reason=f"budget: all {budget.seconds:.0f} s are used")
    folder = work / check.name
    folder.mkdir(parents=True)
    log, report_path = work / f"{check.name}.log", work / f"{check.name}.json"
    limit = min(check.limit_s, budget.left)
    command = [*check.command, "--report", str(report_path), "--folder", str(folder)]
    start = time.monotonic()
    status = run_limited(command, log, limit, REPOSITORY)
    seconds = time.monotonic() - start
    report = Report.read(report_path) if report_path.is_file() else Report()
    if status == 0:
        return Outcome(check, "passed", seconds, report=report)
    if status == ABSENT_STATUS and report.absent:
        return Outcome(check, "absent", seconds, report.absent, report)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    if status is None:
        whose = "its own" if limit == check.limit_s else "what the budget had left"
        return Outcome(check, "out of time", seconds, f"ended after {limit:.0f} s, {whose}", report, tail)
    return Outcome(check, "failed", seconds, _why(status, report), report, tail)


def _why(status: int, report: Report) -> str:
    if report.wrong:
        return "; ".join(report.wrong)
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}"


@contextmanager
def _stop_signals() -> Iterator[None]:
    """While it lasts, Ctrl-C and SIGTERM raise Stopped, once: a second one while things are put in order does not."""

    def stop(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        print("stopping: what is known is written", file=sys.stderr, flush=True)
        raise Stopped

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
