"""`<run_dir>/status.json`: what a run is at, for `megatron-sr1 watch`. The main rank replaces it as a whole, so nobody
reads half of it; a thread does, which asks the main thread nothing, so that the file also tells of one that waits."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from megatron_sr1.metrics.pace import Pace
from megatron_sr1.phases import Phases, during
from megatron_sr1.printable import one_printable_line
from megatron_sr1.processes import GONE, began_at, place, state_of

FILE = "status.json"
TICK_SECONDS = 1.0  # between two looks at what has changed
SIGN_SECONDS = 5.0  # after which the file is written anew though nothing has
SILENT_SECONDS = 4 * SIGN_SECONDS  # that a process which cannot be seen may take until it is called silent
_LONGEST_REASON = 500  # characters
_OPTIONAL = ("step_seconds", "ends", "done")
_FAR = 1e15  # seconds or steps: no run is that long, and no clock goes that far
State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Status:
    """Of a run; times are in seconds since 1970, by the clock of its machine."""

    command: str
    steps: int  # in all
    state: State = "running"
    reason: str = ""  # of what failed
    host: str = ""
    namespace: str = ""  # of the process id, see `processes.place`
    process_id: int = 0
    process_began: str = ""  # see `processes.began_at`
    began: float = 0.0  # the command
    updated: float = 0.0
    done: int | None = None  # steps, with those of earlier starts; None: nobody knows yet
    going_on: int = 0  # steps that were done when this start began
    phases: tuple[str, ...] = ()  # the outermost first
    since: float = 0.0  # when the outermost began
    detail: str = ""  # how far that is
    step_seconds: float | None = None  # median of the last
    ends: float | None = None  # when the run will, by that
    stages: tuple[tuple[str, float], ...] = ()  # that have ended, of the start and between steps, and their seconds

    @property
    def is_over(self) -> bool:
        return self.state != "running"

    @property
    def process(self) -> Literal["there", "gone", "unseen"]:
        """What can be told of its process from here."""
        state = state_of(self.host, self.namespace, self.process_id, self.process_began)
        return "unseen" if state == "?" else "gone" if state in GONE else "there"


class StatusFile:
    """Of the main rank's process, while its `with` lasts. A disk that is full or away costs the file, not the run."""

    def __init__(self, folder: Path, command: str, steps: int, phases: Phases = during) -> None:
        self._path, self._phases = folder / FILE, phases
        host, namespace = place()
        number = os.getpid()
        who = {"host": host, "namespace": namespace, "process_id": number, "process_began": began_at(number)}
        self._status = Status(command, steps, began=phases.began, **who)
        self._written: Status | None = None
        self._over = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="status", daemon=True)

    def __enter__(self) -> StatusFile:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        asked = kind is not None and issubclass(kind, SystemExit | KeyboardInterrupt)
        state: State = "finished" if kind is None else "stopped" if asked else "failed"
        failed = error is not None and state == "failed"
        reason = one_printable_line(str(error) or type(error).__name__)[:_LONGEST_REASON] if failed else ""
        self._status = replace(self._status, state=state, reason=reason)
        self._write()

    def note(self, **values: Any) -> None:
        """Takes what is known better; the file has it within TICK_SECONDS."""
        self._status = replace(self._status, **values)

    def stage(self, name: str, seconds: float) -> None:
        """Something of the start, or between steps, has ended."""
        self.note(stages=(*self._status.stages, (name, round(seconds, 3))))

    def _watch(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            self._write()

    def _write(self) -> None:
        """Where something has changed, or a sign of life is due."""
        now, opened = time.time(), self._phases.open
        since = now - (time.monotonic() - opened[0].since) if opened else now
        told = replace(
            self._status, phases=tuple(phase.name for phase in opened), since=since, detail=self._phases.detail
        )
        before = self._written
        if before is not None and now - before.updated < SIGN_SECONDS:
            rest = {"updated": before.updated, "since": before.since}
            if replace(told, **rest) == before:
                return
        told = replace(told, updated=now)
        if not self._writing.acquire(timeout=TICK_SECONDS):  # the disk does not answer
            return
        try:
            if self._over.is_set() and not told.is_over:
                return  # the last word is another
            with suppress(OSError):
                partial = self._path.with_name(f"{FILE}.tmp")
                partial.write_text(json.dumps(asdict(told)) + "\n", encoding="utf-8")
                os.replace(partial, self._path)
                self._written = told
        finally:
            self._writing.release()


class StatusSink:
    """Notes each step there."""

    def __init__(self, status: StatusFile, pace: Pace, start_step: int) -> None:
        """
        Args:
            pace: has had each step when this has it.
            start_step: the first that will be written.
        """
        self._status, self._pace = status, pace
        status.note(done=start_step, going_on=start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """`values` are in metrics.jsonl."""
        left = self._pace.seconds_left
        ends = None if left is None else time.time() + left
        self._status.note(done=step + 1, step_seconds=self._pace.step_seconds, ends=ends)


def read_status(folder: Path) -> Status | None:
    """None: no run of this release has begun there.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. It is written anew by the run, or may be removed.") from error
    try:
        return _status_of(tree)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no status of a run: {error}. It may be removed.") from error


def _status_of(tree: Mapping[str, Any]) -> Status:
    names = {each.name for each in fields(Status)}
    known = {name: value for name, value in tree.items() if name in names}
    known["phases"] = tuple(str(name) for name in known.get("phases", ()))
    known["stages"] = tuple((str(name), float(seconds)) for name, seconds in known.get("stages", ()))
    status = Status(**known)
    for name in ("steps", "began", "updated", "since", "step_seconds", "ends", "done"):
        value = getattr(status, name)
        is_number = type(value) in (int, float) and abs(value) < _FAR
        if not is_number and not (value is None and name in _OPTIONAL):
            raise ValueError(f"{name} is no number")
    if status.state not in get_args(State) or type(status.process_id) is not int:
        raise ValueError("its state, or its process, is none")
    words = ("command", "reason", "host", "namespace", "process_began", "detail")
    if not all(isinstance(getattr(status, name), str) for name in words):
        raise ValueError("one of its words is none")
    return status
