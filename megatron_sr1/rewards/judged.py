"""Rewards and passes that ask a model behind an endpoint: by threads of the rank, while the engine decodes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from megatron_sr1.config import Endpoint
from megatron_sr1.config.rules import ConfigError
from megatron_sr1.judge import Judge, NoVerdict
from megatron_sr1.prompts import Asked
from megatron_sr1.rewards.scoring import Ungraded, Vectors, score_or_tell
from megatron_sr1.types import RolloutGroup

Judged = list[Future[Vectors | Ungraded]]  # of each response to a prompt: a list of one vector


class JudgedRewards:
    """Asks about each response by itself, `endpoint.concurrency` at a time. An answer that does not come is an error
    and never a 0."""

    def __init__(self, endpoint: Endpoint, *, fails_fast: bool, finite: bool = True) -> None:
        """
        Args:
            fails_fast: one failure ends the step, so that nothing more is asked of an endpoint that is gone.
            finite: as in `score_group`.

        Raises:
            ConfigError: as `judge_key`.
        """
        self._closing = threading.Event()
        self._judge = Judge(endpoint, sleep=self._wait)
        self._threads = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="judge")
        self._fails_fast, self._finite = fails_fast, finite
        self._failure: Ungraded | None = None
        self._lock = threading.Lock()  # of what follows
        self._foreseen: dict[str, list[Future[str]]] = {}  # by question: answers that nobody has asked for yet
        self._outage: NoVerdict | ConfigError | None = None  # of such a question

    def close(self) -> None:
        """Nothing more is asked; who waits to ask again does not."""
        self._closing.set()
        self._threads.shutdown(cancel_futures=True)
        self._judge.close()

    @property
    def failures(self) -> list[Ungraded]:
        """The first, where one has failed since the last `forget`."""
        return [] if self._failure is None else [self._failure]

    def submit(self, group: RolloutGroup, names: Sequence[str], asked: Asked) -> Judged:
        """Queues the questions and returns at once. `asked` as in `score_group`."""
        return [self._threads.submit(self._score, replace(group, pairs=(pair,)), names, asked) for pair in group.pairs]

    def read(self, question: str, where: str) -> Future[str | Ungraded]:
        """Queues a question whose answer is a pass, and returns at once.

        Args:
            where: what it is, for the message where no answer comes.
        """
        return self._threads.submit(self._read, question, where)

    def foresee(self, question: str) -> None:
        """Queues a question that a reward will ask, and returns at once: its answer is then there, once."""
        with self._lock:
            self._foreseen.setdefault(question, []).append(self._threads.submit(self._ask_ahead, question))

    def forget(self) -> None:
        """The step is over: a failure in it says nothing of the next, and what nobody has asked for is dropped."""
        with self._lock:
            self._foreseen, self._outage, self._failure = {}, None, None

    def _ask_ahead(self, question: str) -> str:
        if self._outage is not None:
            raise self._outage  # nothing more is asked of an endpoint that is gone
        try:
            return self._judge.ask(question)
        except (NoVerdict, ConfigError) as error:
            if self._fails_fast:
                self._outage = error
            raise

    def _ask(self, question: str) -> str:
        """A reward's question; one that was foreseen and still waits is put here, so no thread waits for another."""
        with self._lock:
            ahead = self._foreseen.get(question)
            future = ahead.pop(0) if ahead else None
        return self._judge.ask(question) if future is None or future.cancel() else future.result()

    def _score(self, group: RolloutGroup, names: Sequence[str], asked: Asked) -> Vectors | Ungraded:
        if self._failure is not None:
            return self._failure
        failures: list[NoVerdict | ConfigError] = []

        def ask(question: str) -> str:
            try:
                return self._ask(question)
            except (NoVerdict, ConfigError) as error:
                failures.append(error)
                raise

        scored = score_or_tell(group, names, finite=self._finite, ask=ask, asked=asked)
        if failures and not isinstance(scored, Ungraded):  # a function that passes over it would make an outage a 0
            where = f"response {group.pairs[0].sample_index} to sample {group.prompt.key!r}"
            scored = Ungraded(f"the rewards {', '.join(names)} of {where} were not answered: {failures[0]}")
        if isinstance(scored, Ungraded) and self._fails_fast:
            self._failure = scored
        return scored

    def _read(self, question: str, where: str) -> str | Ungraded:
        if self._failure is not None:
            return self._failure
        try:
            return self._judge.ask(question, cut=True)
        except (NoVerdict, ConfigError) as error:
            failure = Ungraded(f"{where} was not answered by its endpoint: {error}")
        if self._fails_fast:
            self._failure = failure
        return failure

    def _wait(self, seconds: float) -> None:
        self._closing.wait(seconds)


def with_judged(own: Vectors | Ungraded, judged: Judged) -> Vectors | Ungraded:
    """One vector a response of both kinds; waits for the answers."""
    vectors: Vectors = []
    for future in judged:
        scored = future.result()
        if isinstance(scored, Ungraded):
            return scored
        vectors += scored
    if isinstance(own, Ungraded) or not judged:
        return own
    return [{**mine, **theirs} for mine, theirs in zip(own, vectors, strict=True)]
