"""A tracker in a thread of its own: one that is slow, away or broken costs its points, and never the run."""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

from megatron_sr1.config import ConfigError
from megatron_sr1.metrics.samples import SampleRow
from megatron_sr1.metrics.tracker import Ending, Tracker
from megatron_sr1.printable import printable

OPEN_SECONDS = 120.0  # W&B itself gives up after 90
STEP_SECONDS = 5.0  # that a step waits for a tracker, until one is late
END_SECONDS = 30.0  # that the end of a run waits
_MOST_WAITING = 1000  # steps
_NUMBERS = re.compile(r"\w*\d\w*")  # and addresses, and names of requests
Value = TypeVar("Value")


class _Call(Generic[Value]):
    """Something to do there, and how it went."""

    def __init__(self, work: Callable[[], Value]) -> None:
        self._work = work
        self.done = threading.Event()
        self.result: list[Value] = []
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Whatever a library raises is kept: the run does not end because of it."""
        self.error = error
        self.done.set()
        return isinstance(error, Exception)

    def run(self) -> None:
        with self:
            self.result = [self._work()]


class BackgroundTracker:
    """Hands each call to the tracker's thread, which ends with the process, whatever holds it."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """`name`: of the tracker, in warnings. Raises ConfigError as `make`; where it is away, `run_id` is ""."""
        self._name = name
        self._calls: queue.Queue[_Call[Any] | None] = queue.Queue(_MOST_WAITING)
        self._late: _Call[Any] | None = None  # that the thread has not come back from
        self._is_lossy = False
        self._said = ""  # last
        threading.Thread(target=self._work, name=name, daemon=True).start()
        self._tracker: Tracker | None = None
        opened = _Call(make)
        self._calls.put(opened)
        if not opened.done.wait(OPEN_SECONDS):
            self._say(f"does not answer within {OPEN_SECONDS:g} s")
        elif isinstance(opened.error, ConfigError):
            self._calls.put(None)
            raise opened.error
        elif opened.error is not None:
            self._say(_reason(opened.error))
        else:
            self._tracker = opened.result[0]

    @property
    def run_id(self) -> str:
        """What the tracker knows the run by; "": it was never opened."""
        return "" if self._tracker is None else self._tracker.run_id

    @property
    def is_open(self) -> bool:
        """Whether it answers."""
        return self._tracker is not None and (self._late is None or self._late.done.is_set())

    def write(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether the tracker has taken them by now."""
        tracker = self._tracker
        return tracker is not None and self._call(lambda: tracker.write(step, values), STEP_SECONDS)

    def show(self, step: int, name: str, rows: Sequence[SampleRow]) -> bool:
        """As `write`, of samples."""
        tracker = self._tracker
        return tracker is not None and self._call(lambda: tracker.show(step, name, rows), STEP_SECONDS)

    def finish(self, ending: Ending) -> None:
        """Waits no longer than END_SECONDS, whatever the tracker does."""
        tracker = self._tracker
        if tracker is not None:
            self._late = None  # wait once more
            self._call(lambda: tracker.finish(ending), END_SECONDS)
        if self.is_open or tracker is None:
            self._put(None)

    def _call(self, work: Callable[[], object], seconds: float) -> bool:
        if self._late is not None and self._late.done.is_set():
            self._late = None
        call = _Call(work)
        if not self._put(call) or self._late is not None:
            return False
        if not call.done.wait(seconds):
            self._late = call
            self._say(f"does not answer within {seconds:g} s")
            return False
        if call.error is not None:
            self._say(_reason(call.error))
        return call.error is None

    def _put(self, call: _Call[Any] | None) -> bool:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._is_lossy:
                self._say(f"{_MOST_WAITING} steps wait for it; what comes now is left out")
            self._is_lossy = True
            return False
        return True

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()

    def _say(self, what: str) -> None:
        """Once of the same, whatever number or address it ends in."""
        kind = _NUMBERS.sub("#", what)
        if kind == self._said:
            return
        self._said = kind
        print(
            f"warning: tracker {self._name}: {printable(what)}. The run goes on; all its metrics are in metrics.jsonl.",
            file=sys.stderr,
            flush=True,
        )


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).removesuffix(".")
