"""Signals of this process, for as long as somebody listens to them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def handled(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """While it lasts, these signals go to `handler`; afterwards to where they went before. In the main thread alone."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
