"""Prompts that no engine has begun: whoever has a free slot takes the next one.

An engine begins with as many of its own as fill its slots. The others, its own among them, are everybody's, in turn of
the engines, so that each meets its own, which it has decoded, about as often as it can; one of another engine's is
decoded while the engine goes on with what it has. Tokens do not depend on who answers: each request has its own seed.
But which requests share a step does, and with it the last bits of log-probs, so where bits must be the same each engine
answers its own (`rollout.pull`).
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

from megatron_sr1.ahead import Later
from megatron_sr1.ranks import Counter
from megatron_sr1.types import Prompt, PromptShare

AHEAD = 1  # prompts that an engine has taken and not begun: the next one is decoded meanwhile


def begun(share: PromptShare, engine: int, count: int) -> PromptShare:
    """The first `count` of an engine's own."""
    places = share.shares[engine][:count]
    return PromptShare(share.keys, {place: share.own[place] for place in places})


class PromptPool:
    """Those of a round that are left when each engine has begun `count` of its own."""

    def __init__(self, share: PromptShare, count: int, counter: Counter, decoding: ThreadPoolExecutor) -> None:
        left = itertools.zip_longest(*(places[count:] for places in share.shares))
        self._order = [place for turn in left for place in turn if place is not None]
        self._share = share
        self._counter = counter
        self._decoding = decoding
        self._taken: list[tuple[int, Later[Prompt]]] = []
        self._is_empty = not self._order
        self._look_ahead()

    def take(self) -> tuple[int, Prompt] | None:
        """Place and prompt of the next one; None where there is none. Raises ValueError or OSError where it cannot
        be read any more."""
        if not self._taken:
            return None
        place, prompt = self._taken.pop(0)
        self._look_ahead()
        return place, prompt()

    def _look_ahead(self) -> None:
        while not self._is_empty and len(self._taken) < AHEAD:
            number = self._counter.next()
            if number >= len(self._order):
                self._is_empty = True
                return
            place = self._order[number]
            prompt = Later(lambda place=place: self._read(place), self._decoding)
            prompt.start()
            self._taken.append((place, prompt))

    def _read(self, place: int) -> Prompt:
        own = self._share.own.get(place)
        if own is not None:
            return own
        assert self._share.read is not None, "a share of prompts that others may answer can be read"
        return self._share.read(place)
