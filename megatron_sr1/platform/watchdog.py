"""Ends a run that hangs: on every rank, with what each was at, and the first cause first.

Each rank has two threads that go on while its main thread waits for something. One writes a sign of life where the next
rank sees it, and reads that of the rank after this one: in a ring, so that no rank reads more than one other's. The
other compares what the main thread is at with its limit, and what it last heard with the clock. Who finds something
writes it as the cause, unless another has; every rank then writes its stacks into `<run_dir>/hang` and ends with
HUNG_STATUS. The second thread asks nobody, so it also ends a rank whose store does not answer any more.

A machine that sleeps, or a job that is suspended as a whole, stops these threads, too: time in which they did not run
is not counted.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from torch.distributed import DistError

from megatron_sr1.phases import WAIT, Phases
from megatron_sr1.platform.board import CAUSE, Board, job_board
from megatron_sr1.processes import GONE as _DEAD
from megatron_sr1.processes import place, state_of

HUNG_STATUS = os.EX_SOFTWARE  # 70, sysexits.h: neither a mistake of the user's nor a request
_FAILED = "failed ("
_SILENT_STORE = (
    "the store through which the ranks have met, which rank 0's machine keeps, has not answered for {:.0f} s"
)
GONE = "has ended without a word"  # in a cause
FOLDER = "hang"  # of the stacks, in the run's
_TICK_SECONDS = 1.0
_TALK_SECONDS = 2.0
_LEAP_SECONDS = 5.0  # between two ticks: this process was stopped itself
_WAITING = 1.1  # times a limit, for a rank that only waits: who hangs speaks first
_UNWINDING_SECONDS = 45.0  # for a main thread whose error may be that of another rank, too
_GRACE_SECONDS = 5.0  # for all to hear of it, and for a main thread that is about to end by itself
_LONGEST_END = 60.0  # of a process that says where it stood
_UNSEEN = 6  # times the silent seconds, where nothing is known of a process but its silence


@dataclass(frozen=True)
class Sign:
    """A sign of life of a rank."""

    number: int
    host: str
    namespace: str  # of its process id: ranks in containers of one host may not see each other's
    process_id: int
    at: str  # `str(phases)`
    seconds: float  # since that changed
    over: bool = False  # it has ended as it should


_UNKNOWN = Sign(-1, "a machine", "", 0, "its start", 0.0)  # of a rank that has not given any


@dataclass
class _Heard:
    """The last sign of another rank, and when it came."""

    rank: int
    sign: Sign
    when: float


class Watchdog:
    """Of one rank, while its `with` lasts."""

    def __init__(
        self,
        phases: Phases,
        limits: Mapping[str, float],
        idle_seconds: float,
        silent_seconds: float,
        folder: Path,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        board: Board | None = None,
    ) -> None:
        """
        Args:
            limits: seconds that a phase may take, by its name.
            idle_seconds: that may pass without any change, of what has no limit.
            silent_seconds: without a sign of life after which a rank is looked for.
            folder: of the run.
            board: of all ranks; None where there is one.
        """
        self._phases, self._limits, self._idle, self._silent = phases, limits, idle_seconds, silent_seconds
        self._folder = folder / FOLDER
        self._rank, self._num_ranks, self._board = rank, num_ranks, board
        self._numbers = itertools.count()
        self._heard: _Heard | None = None
        self._keeper: Sign | None = None  # of rank 0, which keeps the store where there is one
        self._answered = time.monotonic()  # when the board did last
        self._cause: str | None = None
        self._over, self._ending = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._judge, name="watchdog", daemon=True)]
        if board is not None:
            self._threads.append(threading.Thread(target=self._talk, name="signs of life", daemon=True))

    def __enter__(self) -> Watchdog:
        if self._board is not None:  # before this rank waits for another
            self._board.write(self._name(self._rank), json.dumps(asdict(self._sign())))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Whoever ends with an error that others may not have says so: they would wait for it."""
        failed = error is not None and not isinstance(error, (SystemExit, KeyboardInterrupt))
        # a collective may fail because another rank has ended, and that is the cause
        if self._board is not None and isinstance(error, RuntimeError) and self._ending.wait(2 * _GRACE_SECONDS):
            time.sleep(_LONGEST_END)  # the other thread ends this process
        board = self._board
        if board is not None and failed:
            reason = " ".join(str(error).split())[:500]
            cause = f"rank {self._rank} {_FAILED}{type(error).__name__}: {reason})"
            self._in_time(lambda: board.write_first(CAUSE, cause))
            if self._rank == 0 and not board.outlives:  # until the others have asked
                time.sleep(2 * _TALK_SECONDS)
        self._over.set()
        if board is not None:
            self._threads[-1].join(_GRACE_SECONDS)  # whose sign would come after the last
            self._in_time(lambda: board.write(self._name(self._rank), json.dumps(asdict(self._sign(over=True)))))

    def _in_time(self, write: Callable[[], None]) -> None:
        """Or not at all: a store or a disk that does not answer shall not keep this process."""

        def attempt() -> None:
            with suppress(OSError, DistError):  # whoever kept it has ended
                write()

        writing = threading.Thread(target=attempt, daemon=True)
        writing.start()
        writing.join(_GRACE_SECONDS)

    # ---------------------------------------------------------------- one thread: what others say
    def _talk(self) -> None:
        assert self._board is not None
        while not self._over.wait(_TALK_SECONDS):
            try:
                self._board.write(self._name(self._rank), json.dumps(asdict(self._sign())))
                self._listen(self._board)
                self._cause = self._cause or self._board.read(CAUSE)
            except (OSError, DistError, ValueError):
                continue  # the judge sees that it has not answered
            self._answered = time.monotonic()

    def _listen(self, board: Board) -> None:
        if self._keeper is None:
            self._keeper = self._read(board, 0)
        after = (self._rank + 1) % self._num_ranks if self._heard is None else self._heard.rank
        sign = self._read(board, after)
        while sign is not None and sign.over and after != self._rank:
            after = (after + 1) % self._num_ranks
            sign = self._read(board, after)
        if after == self._rank:
            self._heard = None
        elif sign is None:
            self._heard = self._heard or _Heard(after, _UNKNOWN, time.monotonic())
        elif self._heard is None or (after, sign.number) != (self._heard.rank, self._heard.sign.number):
            self._heard = _Heard(after, sign, time.monotonic())

    def _read(self, board: Board, rank: int) -> Sign | None:
        text = board.read(self._name(rank))
        return None if text is None else Sign(**json.loads(text))

    def _sign(self, *, over: bool = False) -> Sign:
        since = time.monotonic() - self._phases.changed
        return Sign(next(self._numbers), *place(), os.getpid(), str(self._phases), since, over)

    @staticmethod
    def _name(rank: int) -> str:
        return f"rank{rank}"

    # ---------------------------------------------------------------- the other: what to make of it
    def _judge(self) -> None:
        last = started = time.monotonic()
        while not self._over.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - last > _LEAP_SECONDS:
                started = now
            last = now
            found = self._cause or self._hangs(now, started) or self._is_alone(now, started)
            if found is not None and not self._over.is_set():
                self._end(found)

    def _hangs(self, now: float, started: float) -> str | None:
        """What this rank's main thread is at for too long."""
        phases, changed = self._phases.open, self._phases.changed
        innermost = phases[-1] if phases else None
        only_waits = innermost is not None and innermost.name == WAIT
        for phase in phases:
            limit = self._limits.get(phase.name) if phase.longest is None else phase.longest
            took = now - max(phase.since, started)
            if limit is not None and took > limit * (_WAITING if only_waits else 1.0):
                return self._told(phase.name, took, limit)
        took = now - max(changed, started)
        if only_waits or (innermost is not None and innermost.longest is not None) or took <= self._idle:
            return None
        return self._told("one thing" if innermost is None else innermost.name, took, self._idle)

    def _told(self, name: str, took: float, limit: float) -> str:
        return (
            f"rank {self._rank} on {socket.gethostname()} hangs ({self._phases}): {took:.0f} s of {name}, where "
            f"{limit:.0f} s are allowed (section watchdog)"
        )

    def _is_alone(self, now: float, started: float) -> str | None:
        """Whether a rank that this one looks at has stopped or ended."""
        if self._board is None:
            return None
        answered, heard = self._answered, self._heard
        unanswered = now - max(answered, started)
        if unanswered > self._silent and self._rank != 0:  # and nothing is heard of anybody
            if self._keeper is not None and _state(self._keeper) in (*_DEAD, "T"):
                return self._looked_up(0, self._keeper, unanswered)
            return _SILENT_STORE.format(unanswered) if unanswered > _UNSEEN * self._silent else None
        return None if heard is None else self._looked_up(heard.rank, heard.sign, answered - max(heard.when, started))

    def _looked_up(self, rank: int, sign: Sign, silent: float) -> str | None:
        who = f"rank {rank} on {sign.host}, process {sign.process_id}, last at {sign.at}"
        state = _state(sign)
        if state in _DEAD and silent > _GRACE_SECONDS:
            return f"{who}, {GONE}: killed, or out of memory"
        if state == "T" and silent > self._silent:
            return f"{who}, is stopped (SIGSTOP) for {silent:.0f} s"
        if state == "?" and silent > _UNSEEN * self._silent:  # a process that is seen is at something
            return f"{who}, gives no sign of life for {silent:.0f} s"
        return None

    # ---------------------------------------------------------------- the end
    def _end(self, cause: str) -> None:
        """Of this process, when all others have heard of it: whoever has started them may end them with the first."""
        self._ending.set()
        known = self._cause is not None
        if not known:
            with suppress(OSError, ValueError):  # who reads it may be gone
                print(f"megatron-sr1: {cause}. Where every rank stood: {self._folder}", file=sys.stderr, flush=True)
            self._post(cause)
        self._in_time(lambda: self._write_stacks(cause))  # a file system may be what hangs
        if not self._over.wait(_UNWINDING_SECONDS if known and _FAILED in cause else _GRACE_SECONDS):
            os._exit(HUNG_STATUS)

    def _write_stacks(self, cause: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"cause: {cause}\nrank {self._rank} at {self._phases}, on {now}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _post(self, cause: str) -> None:
        """To all others. And ends who is stopped."""
        board = self._board
        if board is not None:
            self._in_time(lambda: board.write_first(CAUSE, cause))
        for sign in (self._keeper, None if self._heard is None else self._heard.sign):
            if sign is not None and _state(sign) == "T":
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(sign.process_id, signal.SIGKILL)


def watched_rank(
    phases: Phases,
    limits: Mapping[str, float],
    idle_seconds: float,
    silent_seconds: float,
    folder: Path,
    rank: int,
    num_ranks: int,
) -> Watchdog:
    """Of a rank of a job, see `Watchdog`."""
    others = {"rank": rank, "num_ranks": num_ranks, "board": job_board(num_ranks)}
    return Watchdog(phases, limits, idle_seconds, silent_seconds, folder, **others)


def _state(sign: Sign) -> str:
    return state_of(sign.host, sign.namespace, sign.process_id)
