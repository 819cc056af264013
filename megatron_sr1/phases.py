"""What the main thread of this process is at, for whoever watches that it gets on (`platform/watchdog.py`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """Something that was begun and has not ended."""

    name: str
    since: float  # time.monotonic()
    longest: float | None = None  # seconds that it may take; None: as the watchdog's configuration says


class Phases:
    """Phases within phases. Other threads work for the main one, and what they are at is not noted."""

    def __init__(self) -> None:
        self.step: int | None = None  # as in metrics.jsonl: how many are done
        self.detail = ""  # how far the outermost phase is, for whoever watches
        self.began = time.time()  # when the command did, or this process
        # what a profiler calls a part of the main thread's time
        self.mark: Callable[[str], AbstractContextManager[object]] | None = None
        self._spent: dict[str, float] = {}
        self._open: tuple[Phase, ...] = ()
        self._changed = time.monotonic()

    @contextmanager
    def __call__(self, name: str, longest: float | None = None) -> Iterator[None]:
        """Within its `with` the main thread is at `name`.

        Args:
            longest: seconds that this may take, where whoever begins it knows that better than a configuration.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, start = self._open, time.monotonic()
        self._changed = start
        self._open = (*before, Phase(name, start, longest))
        try:
            with self.marked(name):
                yield
        finally:
            self._open, self._changed = before, time.monotonic()
            if all(phase.name != name for phase in before):
                self._spent[name] = self.spent(name) + self._changed - start

    def marked(self, name: str | Callable[[], str]) -> AbstractContextManager[object]:
        """A part of the main thread's time that only a profiler is told of."""
        if self.mark is None or threading.current_thread() is not threading.main_thread():
            return nullcontext()
        return self.mark(name if isinstance(name, str) else name())

    def spent(self, name: str) -> float:
        """Seconds of the main thread in phases of this name that have ended."""
        return self._spent.get(name, 0.0)

    def moved(self) -> None:
        """What is open has come forward: its time counts anew. Of the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._changed = time.monotonic()
            self._open = tuple(replace(phase, since=self._changed) for phase in self._open)

    @property
    def open(self) -> tuple[Phase, ...]:
        """Those that have not ended, the outermost first."""
        return self._open

    @property
    def changed(self) -> float:
        """When one began or ended last, as of time.monotonic()."""
        return self._changed

    def __str__(self) -> str:
        """Step and phases, such as "step 3: rollout, engine step" of the third."""
        names = ", ".join(phase.name for phase in self._open) or "between phases"
        return names if self.step is None else f"step {self.step + 1}: {names}"


during = Phases()  # of this process
WAIT = "wait for the other ranks"
