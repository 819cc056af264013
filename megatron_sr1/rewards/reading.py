"""Passes that a model behind an endpoint answers: asked as soon as their context is known, while the engine decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Lock

from megatron_sr1.prompts import Asked
from megatron_sr1.rewards.judged import JudgedRewards
from megatron_sr1.rewards.scoring import Ungraded, Vectors
from megatron_sr1.types import Reading, RolloutGroup, RolloutPair

Answered = tuple[int, int, Reading]  # (group_id, sample, reading)


class EndpointReadings:
    """What is asked of the groups of a step, and what comes back."""

    def __init__(self, judged: JudgedRewards, asked: Asked) -> None:
        """Args: asked: the templates that the questions are of."""
        self._judged, self._templates = judged, asked
        self._asked: dict[int, list[tuple[int, Reading, Future[str | Ungraded]]]] = {}

    def ask(self, group: int, sample: int, text: str, reading: Reading) -> None:
        """Queues a question and returns at once. See `types.OnQuestion`."""
        where = f"the pass {reading.pass_name!r} of {reading.rollout.rollout_id!r}"
        self._asked.setdefault(group, []).append((sample, reading, self._judged.read(text, where)))

    def futures(self, group: int) -> list[Future[str | Ungraded]]:
        """Those of a group's questions."""
        return [future for _, _, future in self._asked.get(group, ())]

    def attached(self, group: RolloutGroup) -> RolloutGroup | Ungraded:
        """The group with its answers; waits for them. Ungraded where one does not come."""
        answers = []
        for sample, reading, future in self._asked.get(group.group_id, ()):
            text = future.result()
            if isinstance(text, Ungraded):
                return text
            answers.append((group.group_id, sample, self._answered(reading, text)))
        return with_readings([group], answers)[0]

    def forget(self, group: int) -> None:
        """What was asked of a group has been used."""
        self._asked.pop(group, None)

    def collect(self) -> list[Answered]:
        """All answers since the last call, without those that did not come; waits for what is missing."""
        asked, self._asked = self._asked, {}
        answers = []
        for group, questions in asked.items():
            for sample, reading, future in questions:
                text = future.result()
                if not isinstance(text, Ungraded):
                    answers.append((group, sample, self._answered(reading, text)))
        return answers

    def _answered(self, reading: Reading, text: str) -> Reading:
        template = self._templates.plain if reading.context is None else self._templates.second
        return replace(reading, rollout=replace(reading.rollout, response_text=template.behind_opening(text)))


def with_readings(groups: Sequence[RolloutGroup], answers: Iterable[Answered]) -> list[RolloutGroup]:
    """The groups, each pair with its own of the answers behind what it holds already."""
    found: dict[tuple[int, int], list[Reading]] = {}
    for number, sample, reading in sorted(answers, key=lambda answer: (answer[2].pass_name, answer[2].number)):
        found.setdefault((number, sample), []).append(reading)

    def whole(group: RolloutGroup, pair: RolloutPair) -> RolloutPair:
        return replace(pair, further=(*pair.further, *found.get((group.group_id, pair.sample_index), ())))

    return [replace(group, pairs=tuple(whole(group, pair) for pair in group.pairs)) for group in groups]


def after(
    futures: list[Future[str | Ungraded]], start: Callable[[], Future[Vectors | Ungraded]]
) -> Future[Vectors | Ungraded]:
    """What `start` leads to, which is called when all futures are done: no thread waits for them."""
    if not futures:
        return start()
    result: Future[Vectors | Ungraded] = Future()
    lock, left = Lock(), [len(futures)]

    def hand_on(done: Future[Vectors | Ungraded]) -> None:
        if done.cancelled():
            result.cancel()
        elif (error := done.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(done.result())

    def count(_: Future[str | Ungraded]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        try:
            start().add_done_callback(hand_on)
        except RuntimeError:  # the threads have ended
            result.cancel()

    for future in futures:
        future.add_done_callback(count)
    return result
