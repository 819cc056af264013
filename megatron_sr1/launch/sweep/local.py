"""The runs of a sweep on this machine: some at a time, each a process of its own with a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO

from megatron_sr1.launch.sweep.file import Sweep, SweepRun
from megatron_sr1.parent_process import end_with_parent
from megatron_sr1.signals import handled

STOPPED_STATUS = os.EX_TEMPFAIL  # how a run that was asked to stop, and has saved, ends
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `status` is its exit status, None for a run that was not started any more."""

    run: SweepRun
    status: int | None
    log: Path

    @property
    def finished(self) -> bool:
        return self.status == 0


def command_of(sweep: Sweep, run: SweepRun) -> list[str]:
    """The words that follow `megatron-sr1`."""
    return [sweep.command, sweep.config, *run.overrides]


def run_here(sweep: Sweep, runs: Sequence[SweepRun], jobs: int, say: Callable[[str], None]) -> list[Outcome]:
    """Runs them in order, `jobs` at a time; one that fails does not keep the others from running.

    SIGTERM or SIGINT to this process goes to the runs as SIGTERM: they save and end, and no further one is started. So
    does the death of this process.

    Args:
        say: takes what is to be shown: each line that a run prints, with the run's name before it.
    """
    waiting, working, outcomes = list(runs), [], {}
    with ExitStack() as files, _stop_signals(working) as stopped:
        while working or (waiting and not stopped):
            while waiting and len(working) < jobs and not stopped:
                working.append(_start(sweep, waiting.pop(0), files, say))
                if stopped:  # just now: the handler may have missed it
                    working[-1].popen.terminate()
            time.sleep(POLL_SECONDS)
            for process in list(working):
                status = process.popen.poll()
                process.show(say)
                if status is not None:
                    working.remove(process)
                    outcomes[process.run.name] = Outcome(process.run, status, process.log)
                    say(
                        f"{process.run.name}: {_ending(status)} after {(time.monotonic() - process.start) / 60:.1f} min"
                    )
    return [outcomes.get(run.name, Outcome(run, None, _log(sweep, run))) for run in runs]


@dataclass(frozen=True)
class _Process:
    run: SweepRun
    popen: subprocess.Popen[bytes]
    log: Path
    lines: IO[str]  # the log, from where this process began to write it
    start: float

    def show(self, say: Callable[[str], None]) -> None:
        for line in self.lines:
            say(f"{self.run.name} | {line.rstrip()}")


def _start(sweep: Sweep, run: SweepRun, files: ExitStack, say: Callable[[str], None]) -> _Process:
    log = _log(sweep, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{run.name}: starting, all it prints is in {log}")
    with log.open("ab") as output:
        lines = files.enter_context(log.open("r", encoding="utf-8", errors="replace"))
        lines.seek(0, os.SEEK_END)
        popen = subprocess.Popen(
            [sys.executable, "-m", "megatron_sr1.cli", *command_of(sweep, run)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal comes here alone, and goes on as SIGTERM
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )
    return _Process(run, popen, log, lines, time.monotonic())


def _log(sweep: Sweep, run: SweepRun) -> Path:
    return Path(sweep.run_dir) / f"{run.name}.log"


def _ending(status: int) -> str:
    if status == STOPPED_STATUS:
        return "stopped, the same command goes on with it"
    return "finished" if status == 0 else f"failed with status {status}"


@contextmanager
def _stop_signals(working: Sequence[_Process]) -> Iterator[list[int]]:
    """Gives the list of the stop signals received, each of which goes to the processes at work."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in working:
            process.popen.terminate()

    with handled((signal.SIGTERM, signal.SIGINT), receive):
        yield received
