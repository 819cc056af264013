"""Processes that do not outlive the one that has started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STARTED_BY = "MEGATRON_SR1_STARTED_BY"  # id of the process, in the environment of what it starts


def end_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """This process gets the signal when the one that started it ends. On Linux; nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)


@contextmanager
def naming_parent() -> Iterator[None]:
    """What is started meanwhile is told by whom, for `end_with_named_parent`."""
    os.environ[_STARTED_BY] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_STARTED_BY]


def end_with_named_parent() -> None:
    """As `end_with_parent`, and at once where that has ended before it could be asked for."""
    started_by = os.environ.pop(_STARTED_BY, None)
    end_with_parent()
    if started_by is not None and int(started_by) != os.getppid():
        os._exit(1)
