"""Rewards in worker processes, so that groups are graded while the engine still generates others.

This module stays light (no torch), because every worker imports it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context, parent_process
from queue import LifoQueue

from megatron_sr1.rewards import score_pair
from megatron_sr1.types import Prompt, RolloutGroup, RolloutPair

logger = logging.getLogger(__name__)

PLAIN = {"fmt": "fmt_cot"}  # the layout that a prompt without images asks for, in place of the See-Think one
Vectors = list[dict[str, float]]  # one reward vector per sample
START_SECONDS = 120.0  # on a busy machine
GROUP_SECONDS = 120.0  # an answer takes milliseconds: this is for a reward that hangs
TRIES = 2  # of a group: a worker that was killed is nobody's fault, two are


def grade_pairs(
    pairs: Sequence[RolloutPair], prompt: Prompt, components: Sequence[str], *, rounded: bool = False
) -> Vectors:
    """The named rewards of all samples of one prompt; `rounded` as in `grade`. An exception in a reward is the
    caller's to see."""
    return [score_pair(pair, prompt, components, rounded=rounded) for pair in pairs]


def default_num_workers() -> int:
    """Of a rank: an eighth of the CPUs it may use, since a machine has several ranks, and from two to four."""
    return min(4, max(2, len(os.sched_getaffinity(0)) // 8))


class Graders:
    """A rank's worker processes. Give groups to `submit` as they complete, take the rewards with `collect`."""

    def __init__(self, components: Sequence[str], num_workers: int | None = None) -> None:
        """`components`: names of REWARDS. A worker starts with the first group that finds no other idle."""
        self._components = tuple(components)
        num_workers = num_workers or default_num_workers()
        self._workers = [_Worker() for _ in range(num_workers)]
        self._idle: LifoQueue[_Worker] = LifoQueue()  # the last one first: it has started, and its tables are read
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers)
        self._futures: dict[int, Future[Vectors]] = {}

    def close(self) -> None:
        """Ends the workers; what waits is dropped."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def submit(self, group: RolloutGroup) -> None:
        """Queues a complete group and returns at once. Images stay here: no reward reads them."""
        prompt, components = replace(group.prompt, images=()), self._components
        if not group.prompt.images:
            components = tuple(PLAIN.get(name, name) for name in components)
        self._futures[group.group_id] = self._threads.submit(self._grade, group.pairs, prompt, components)

    def collect(self) -> list[tuple[int, Vectors]]:
        """(group_id, reward vectors) of everything submitted since the last call; waits for what is missing.

        Raises:
            Exception: whatever a reward raised, with the worker's traceback.
            RuntimeError: a group's worker died, or did not end, twice.
        """
        graded = [(group_id, future.result()) for group_id, future in self._futures.items()]
        self._futures = {}
        return graded

    def _grade(self, pairs: Sequence[RolloutPair], prompt: Prompt, components: Sequence[str]) -> Vectors:
        worker = self._idle.get()
        try:
            return worker.grade(pairs, prompt, components)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process at a time: the next takes over where one is killed, or takes too long and is killed here."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._process_id = 0

    def grade(self, pairs: Sequence[RolloutPair], prompt: Prompt, components: Sequence[str]) -> Vectors:
        for _ in range(TRIES):
            future: Future[Vectors] | None = None
            try:
                future = self._running().submit(grade_pairs, pairs, prompt, components)
                return future.result(GROUP_SECONDS)
            except BrokenProcessPool:
                logger.warning("the process that graded prompt %r was killed: another takes over", prompt.key)
            except TimeoutError:
                if future is not None and future.done():
                    raise  # the reward's own
                logger.warning("prompt %r was not graded in %.0f s: its process is replaced", prompt.key, GROUP_SECONDS)
            self.stop()
        raise RuntimeError(
            f"the rewards of prompt {prompt.key!r} ended {TRIES} grading processes, or took more than "
            f"{GROUP_SECONDS:.0f} s in each. Look for "
            "an answer, or a reward of your own, that needs much memory or time."
        )

    def stop(self) -> None:
        """Kills the process where there is one; the next group starts another."""
        if self._pool is None:
            return
        if self._process_id:
            with suppress(ProcessLookupError):
                os.kill(self._process_id, signal.SIGKILL)
        self._pool.shutdown(cancel_futures=True)
        self._pool, self._process_id = None, 0

    def _running(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_live_with_parent)
            self._process_id = self._pool.submit(os.getpid).result(START_SECONDS)
        return self._pool


def _live_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: without this it would outlive a killed rank. It
    looks at its parent's id, because a pipe from there may be held open by what the rank has forked. And a cluster that
    asks a run to stop signals all its processes, and so does Ctrl-C: without this the rank could not end its step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
