"""Rewards in worker processes, so that groups are graded while the engine still generates others.

This module stays light (no torch), because every worker imports it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context, parent_process
from queue import LifoQueue

from megatron_sr1.config import Endpoint
from megatron_sr1.phases import during
from megatron_sr1.prompts import OURS, Asked
from megatron_sr1.rewards.find import find_reward
from megatron_sr1.rewards.judged import Judged, JudgedRewards, with_judged
from megatron_sr1.rewards.reading import Answered, EndpointReadings, after
from megatron_sr1.rewards.scoring import RewardError, Ungraded, Vectors, score_group
from megatron_sr1.rewards.table import for_prompt
from megatron_sr1.types import OnQuestion, RolloutGroup

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # on a busy machine
TRIES = 2  # of a group: a worker that was killed is nobody's fault, two are


def default_num_workers() -> int:
    """Of a rank: an eighth of the CPUs it may use, since a machine has several ranks, and from two to four."""
    return min(4, max(2, len(os.sched_getaffinity(0)) // 8))


class Graders:
    """A rank's worker processes. Give groups to `submit` as they complete, take the rewards with `collect`."""

    def __init__(
        self,
        names: Sequence[str],
        seconds: float = 120.0,
        num_workers: int | None = None,
        *,
        rounded: bool = False,
        finite: bool = True,
        judge: Endpoint | None = None,
        reads: bool = False,
        fails_fast: bool = True,
        asked: Asked = OURS,
    ) -> None:
        """A worker starts with the first group that finds no other idle.

        Args:
            names: of rewards, see `find_reward`.
            seconds: that a group may take; then its process is replaced, and it is tried once more.
            num_workers: None: `default_num_workers`.
            rounded, finite: as in `score_group`.
            judge: whom the rewards ask that need a judge, and passes that are read by an endpoint.
            reads: there are such passes: `ask` takes their questions.
            fails_fast: see `JudgedRewards`.
            asked: the templates that prompts are asked by.

        Raises:
            ValueError: see `find_reward`; a reward needs a judge, and there is none.
        """
        self._names = tuple(names)
        self._asked = asked
        self._asking = {name for name in names if "judge" in find_reward(name).needs}
        foreseen = (find_reward(name).foreseen for name in sorted(self._asking))
        self._foreseen = [question for question in foreseen if question is not None]
        if self._asking and judge is None:
            raise ValueError(f"the rewards {', '.join(sorted(self._asking))} need a judge: set rewards.judge.url.")
        assert judge is not None or not reads, "a pass is read by an endpoint that is not named"
        asks = judge is not None and (reads or bool(self._asking))
        self._judged = (
            JudgedRewards(judge, fails_fast=fails_fast, finite=finite) if asks and judge is not None else None
        )
        self._readings = EndpointReadings(self._judged, asked) if reads and self._judged is not None else None
        self._see_images = {name for name in names if "images" in find_reward(name).needs}
        num_workers = num_workers or default_num_workers()
        self._workers = [_Worker(self._names, seconds, rounded=rounded, finite=finite) for _ in range(num_workers)]
        self._idle: LifoQueue[_Worker] = LifoQueue()  # the last one first: it has started, and its tables are read
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers)
        self._futures: dict[int, tuple[Future[Vectors | Ungraded], Judged]] = {}

    def close(self) -> None:
        """Ends the workers; what waits is dropped."""
        if self._judged is not None:
            self._judged.close()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    @property
    def ask(self) -> OnQuestion | None:
        """Takes the questions of passes that an endpoint reads; None where there are no such passes."""
        return None if self._readings is None else self._readings.ask

    @property
    def ask_early(self) -> Callable[[RolloutGroup], None] | None:
        """Takes a sample whose first pass is done, as a group of one pair, and asks the judge what its rewards will
        ask, while others are still written; None where no reward tells before."""
        return self._ask_early if self._foreseen else None

    def _ask_early(self, sample: RolloutGroup) -> None:
        (pair,), asked = sample.pairs, self._asked.of(sample.prompt)
        for foreseen in self._foreseen:
            question = foreseen(pair, sample.prompt, asked)
            if question is not None and self._judged is not None:
                self._judged.foresee(question)

    def submit(self, group: RolloutGroup, names: Sequence[str] = ()) -> None:
        """Queues a complete group and returns at once; it is graded when its readings have come. Its images stay here
        unless a reward needs them.

        Args:
            names: of rewards, instead of what the graders' own are for this prompt.
        """
        names = names or for_prompt(self._names, bool(group.prompt.images))
        asked = self._asked.of(group.prompt)  # as long as it has its images
        group = _without_experts(group)
        if self._see_images.isdisjoint(names):
            group = replace(group, prompt=replace(group.prompt, images=()))
        asking = [name for name in names if name in self._asking]
        judged = self._judged.submit(group, asking, asked) if self._judged is not None and asking else []
        own = [name for name in names if name not in self._asking]
        futures = [] if self._readings is None else self._readings.futures(group.group_id)
        graded = after(futures, lambda: self._threads.submit(self._grade, group, own, asked))
        self._futures[group.group_id] = (graded, judged)

    @during("reward")
    def collect(self) -> list[tuple[int, Vectors | Ungraded]]:
        """(group_id, reward vectors) of everything submitted since the last call; waits for what is missing. A group
        whose reward fails, or whose worker twice dies or does not end, is ungraded."""
        graded = [(number, with_judged(own.result(), judged)) for number, (own, judged) in self._futures.items()]
        self._futures = {}
        if self._judged is not None:
            self._judged.forget()
        return graded

    @during("reward")
    def take(self, number: int) -> Vectors | Ungraded:
        """What `collect` would say of one group, which it then does not; waits for it."""
        own, judged = self._futures.pop(number)
        return with_judged(own.result(), judged)

    def readings(self) -> list[Answered]:
        """All answers of an endpoint to the groups that `collect` has returned; they are not in these groups."""
        return [] if self._readings is None else self._readings.collect()

    def _grade(self, group: RolloutGroup, names: Sequence[str], asked: Asked) -> Vectors | Ungraded:
        whole = group if self._readings is None else self._readings.attached(group)
        if isinstance(whole, Ungraded):
            return whole
        worker = self._idle.get()
        try:
            return worker.grade(whole, names, asked)
        except ValueError as error:  # of a reward, or of its import in a worker: all ranks must hear of it
            return Ungraded(str(error))
        finally:
            self._idle.put(worker)


def _without_experts(group: RolloutGroup) -> RolloutGroup:
    """They are much, and no reward looks at them."""
    if not group.pairs[0].first.experts:
        return group
    pairs = []
    for pair in group.pairs:
        second = None if pair.second is None else replace(pair.second, experts=b"")
        further = tuple(replace(each, rollout=replace(each.rollout, experts=b"")) for each in pair.further)
        pairs.append(replace(pair, first=replace(pair.first, experts=b""), second=second, further=further))
    return replace(group, pairs=tuple(pairs))


class _Worker:
    """One process at a time: the next takes over where one is killed, or takes too long and is killed here."""

    def __init__(self, names: Sequence[str], seconds: float, *, rounded: bool, finite: bool) -> None:
        self._names, self._seconds = names, seconds
        self._score = partial(_score, rounded=rounded, finite=finite)
        self._pool: ProcessPoolExecutor | None = None
        self._process_id = 0

    def grade(self, group: RolloutGroup, names: Sequence[str], asked: Asked) -> Vectors:
        key = group.prompt.key
        for _ in range(TRIES):
            future: Future[Vectors] | None = None
            try:
                future = self._running().submit(self._score, group, names, asked=asked)
                return future.result(self._seconds)
            except BrokenProcessPool:
                logger.warning("the process that graded sample %r was killed: another takes over", key)
            except TimeoutError:
                if future is not None and future.done():
                    raise  # not for want of time
                logger.warning("sample %r was not graded in %.0f s: its process is replaced", key, self._seconds)
            self.stop()
        raise RewardError(
            f"the rewards {', '.join(names)} of sample {key!r} ended {TRIES} grading processes, or took more than "
            f"rewards.seconds={self._seconds:g} in each. Look for an answer, or a reward of your own, that needs much "
            "memory or time."
        )

    def stop(self) -> None:
        """Kills the process where there is one; the next group starts another."""
        if self._pool is None:
            return
        if self._process_id:
            with suppress(ProcessLookupError):
                os.killpg(self._process_id, signal.SIGKILL)  # with what a reward has started
        self._pool.shutdown(cancel_futures=True)
        self._pool, self._process_id = None, 0

    def _running(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_live_with_parent)
            self._process_id = self._pool.submit(_import_rewards, self._names).result(START_SECONDS)
        return self._pool


def _score(group: RolloutGroup, names: Sequence[str], *, rounded: bool, finite: bool, asked: Asked) -> Vectors:
    """Nobody interrupts a worker by hand: it is a reward that does, with a time limit of its own."""
    try:
        return score_group(group, names, rounded=rounded, finite=finite, asked=asked)
    except KeyboardInterrupt as error:
        raise RewardError(
            f"a reward of {', '.join(names)} interrupted its process on sample {group.prompt.key!r}, as Ctrl-C would. "
            "Have its time limit raise another exception."
        ) from error


def _import_rewards(names: Sequence[str]) -> int:
    """The process' id, when what a reward imports is there: the seconds of a group are for grading alone."""
    for name in names:
        find_reward(name)
    return os.getpid()


def _live_with_parent() -> None:
    """A worker waits for work on a pipe that it holds open itself: without this it would outlive a killed rank. It
    looks at its parent's id, because a pipe from there may be held open by what the rank has forked. And a cluster that
    asks a run to stop signals all its processes, and so does Ctrl-C: without this the rank could not end its step. It
    leads a process group, so that what a reward starts ends with it."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        while os.getppid() == parent.pid:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
