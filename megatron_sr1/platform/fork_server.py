"""The process that ranks are forked from where there is no accelerator: what they all import is imported once.

Ranks that import for themselves each spend the CPU time and the memory on it that a short run needs for all the rest.
Where there is an accelerator each rank is an interpreter of its own: a process that has touched CUDA cannot be forked,
and no one can say of every library what it touches while it is imported.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

from megatron_sr1.parent_process import end_with_parent, naming_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def start_fork_server(modules: Sequence[str]) -> None:
    """Starts the server, where this process has none yet, and returns when it has imported `modules`.

    It ends with this process, and takes no stop signal: a cluster sends those to every process of a job.
    """
    context = multiprocessing.get_context("forkserver")
    # the first of them without torch, whose import takes as long as a kill must not
    first = ("megatron_sr1.ends_with_parent", f"{__package__}.fork_server_start")
    context.set_forkserver_preload([*first, *modules])
    resource_tracker.ensure_running()  # takes no stop signal; starting it would let go of those that are held back
    with held_back(STOP_SIGNALS), naming_parent():
        forkserver.ensure_running()
    probe = context.Process(target=int)
    probe.start()
    probe.join()


def begin_rank() -> None:
    """What a rank does first: it ends with the process that started it, or at once where that has ended, and takes the
    stop signals again. Not Ctrl-C, which reaches it by that process."""
    end_with_parent()
    launcher = multiprocessing.parent_process()
    if launcher is not None and not launcher.is_alive():
        os._exit(1)
    gc.freeze()  # what was imported before the fork stays: nothing to collect, no page to copy
    gc.enable()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(STOP_SIGNALS) - {signal.SIGINT})


@contextmanager
def without_collecting() -> Iterator[None]:
    """For imports: what they make stays, and to look for garbage in it, then and later, takes a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def held_back(signals: Iterable[int]) -> Iterator[None]:
    """The signals wait until the end. A process that is started meanwhile holds them back until it says otherwise."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
