"""Prompts that no engine has begun: whoever has a free slot takes the next one.

Of a step's rollouts an engine begins with as many of its own as fill its slots. The others, its own among them, are
everybody's, in turn of the engines, so that each meets its own, which it has decoded, about as often as it can; one of
another engine's is decoded while the engine goes on with what it has. Of an evaluation all are taken so, and decoded
only then. Tokens do not depend on who answers: each request has its own seed. But which requests share a step does, and
with it the last bits of log-probs, so where bits must be the same each engine takes its own (`rollout.pull`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from megatron_sr1.ahead import Later
from megatron_sr1.phases import during
from megatron_sr1.types import Prompt, PromptShare

AHEAD = 1  # prompts that an engine has taken and not begun: the next one is decoded meanwhile


def begun(share: PromptShare, engine: int, count: int) -> PromptShare:
    """The first `count` of an engine's own."""
    places = share.shares[engine][:count]
    return PromptShare(share.keys, {place: share.own[place] for place in places})


def in_turn(share: PromptShare, count: int = 0) -> list[int]:
    """The places that are left when each engine has begun `count` of its own, in turn of the engines."""
    left = itertools.zip_longest(*(places[count:] for places in share.shares))
    return [place for turn in left for place in turn if place is not None]


def reads(share: PromptShare) -> Callable[[int], Prompt | None]:
    """Reads a prompt where this rank has not read it already."""

    def read(place: int) -> Prompt | None:
        own = share.own.get(place)
        if own is not None:
            return own
        assert share.read is not None, "a share of prompts that others may answer can be read"
        return share.read(place)

    return read


class PromptPool:
    """Those of a round that nobody has begun."""

    def __init__(
        self,
        order: Sequence[int],
        draw: Callable[[], int],
        read: Callable[[int], Prompt | None],
        decoding: Executor,
        *,
        ahead: int = AHEAD,
    ) -> None:
        """
        Args:
            order: their places.
            draw: gives numbers in `order`; each is drawn once, by whoever takes the prompt.
            read: a prompt by place; None: it cannot be used and is passed over.
            ahead: how many are drawn and decoded before they are taken.
        """
        self._order = order
        self._draw = draw
        self._read = read
        self._decoding = decoding
        self._ahead = ahead
        self._taken: list[tuple[int, Later[Prompt | None]]] = []
        self._is_empty = not self._order
        self._look_ahead()

    def take(self) -> tuple[int, Prompt] | None:
        """Place and prompt of the next one; None where there is none. Raises ValueError or OSError where it cannot
        be read any more."""
        while self._taken:
            place, reading = self._taken.pop(0)
            self._look_ahead()
            with during("read"):
                prompt = reading()
            if prompt is not None:
                return place, prompt
        return None

    def _look_ahead(self) -> None:
        while not self._is_empty and len(self._taken) < self._ahead:
            number = self._draw()
            if number >= len(self._order):
                self._is_empty = True
                return
            place = self._order[number]
            reading = Later(lambda place=place: self._read(place), self._decoding)
            reading.start()
            self._taken.append((place, reading))
