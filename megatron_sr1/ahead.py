"""Values that are made once: by other threads, ahead of their use, or by whoever first asks for one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Later(Generic[Value]):
    """A value that is made when it is called for; `start` has it made before that."""

    def __init__(self, make: Callable[[], Value], pool: Executor | None = None) -> None:
        """
        Args:
            make: called until it has returned once; what it raises is raised to whoever calls for the value.
            pool: whose threads `start` uses; None: it is made by whoever calls for it.
        """
        self._make = make
        self._pool = pool
        self._lock = Lock()
        self._future: Future[Value] | None = None

    @property
    def started(self) -> bool:
        """Whether somebody makes it, or has made it."""
        return self._future is not None

    def start(self) -> None:
        """Has it made by the pool, after what the pool was given before. Returns at once."""
        with self._lock:
            if self._future is None and self._pool is not None:
                self._future = self._pool.submit(self._make)

    def __call__(self) -> Value:
        """The value. What the pool has not begun is made here, rather than waited for."""
        with self._lock:
            future = self._future
            if future is None or future.cancel():
                self._future = None  # should making it fail, it is made again at the next call
                future = Future()
                future.set_result(self._make())
                self._future = future
        return future.result()
