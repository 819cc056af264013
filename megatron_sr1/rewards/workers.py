"""Rewards in worker processes, so that groups are graded while the engine still generates others.

This module stays light (no torch), because every worker imports it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process

from megatron_sr1.rewards import score_pair
from megatron_sr1.types import Prompt, RolloutGroup, RolloutPair

PLAIN = {"fmt": "fmt_cot"}  # the layout that a prompt without images asks for, in place of the See-Think one
Vectors = list[dict[str, float]]  # one reward vector per sample


def grade_pairs(pairs: Sequence[RolloutPair], prompt: Prompt, components: Sequence[str]) -> Vectors:
    """The named rewards of all samples of one prompt. An exception in a reward is the caller's to see."""
    return [score_pair(pair, prompt, components) for pair in pairs]


class Graders:
    """A rank's worker processes. Give groups to `submit` as they complete, take the rewards with `collect`."""

    def __init__(self, components: Sequence[str], num_workers: int = 1) -> None:
        """`components`: names of REWARDS. The workers start with the first group."""
        self._components = tuple(components)
        self._pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_live_with_parent)
        self._futures: dict[int, Future[Vectors]] = {}

    def close(self) -> None:
        """Ends the workers; what waits is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def submit(self, group: RolloutGroup) -> None:
        """Queues a complete group and returns at once. Images stay here: no reward reads them."""
        prompt, components = replace(group.prompt, images=()), self._components
        if not group.prompt.images:
            components = tuple(PLAIN.get(name, name) for name in components)
        self._futures[group.group_id] = self._pool.submit(grade_pairs, group.pairs, prompt, components)

    def collect(self) -> list[tuple[int, Vectors]]:
        """(group_id, reward vectors) of everything submitted since the last call; waits for what is missing.

        Raises:
            Exception: whatever a reward raised, with the worker's traceback.
            BrokenProcessPool: a worker died.
        """
        graded = [(group_id, future.result()) for group_id, future in self._futures.items()]
        self._futures = {}
        return graded


def _live_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: without this it would outlive a killed rank. And a
    cluster that asks a run to stop signals all its processes, and so does Ctrl-C: without this the rank could not end
    its step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
