"""Numbers that the ranks of a job draw from one counter, each once."""

from __future__ import annotations

import itertools

from megatron_sr1.platform.torch_private import job_store
from megatron_sr1.ranks import Ranks

_MADE = itertools.count()


class TeamCounter:
    """Implements `ranks.Counter` on the store of the job. The ranks of a team draw the same numbers: the first of them
    draws, the others look up what. Keys of a counter go when the next one is begun, which is after all have met."""

    def __init__(self, ranks: Ranks, team_size: int) -> None:
        """
        Args:
            ranks: all of the job; every so many in a row are a team.
        """
        self._store = job_store()
        self._team, self._leads = ranks.rank // team_size, ranks.rank % team_size == 0
        self._alone, self._is_first = team_size == 1, ranks.rank == 0
        self._place = f"draws/{next(_MADE)}"  # counters of a job have one store
        self._name = ""
        self._num_drawn = 0

    def begin(self, name: str) -> None:
        """Goes on with another counter, from 0; every rank begins the same."""
        if self._leads and not self._alone:
            for number in range(self._num_drawn):
                self._store.delete_key(self._key(number))
        if self._is_first and self._name:
            self._store.delete_key(f"{self._place}/{self._name}")
        self._name, self._num_drawn = name, 0

    def next(self) -> int:
        """The next number that nobody has drawn."""
        key = self._key(self._num_drawn)
        self._num_drawn += 1
        if not self._leads:
            return int(self._store.get(key))
        number = self._store.add(f"{self._place}/{self._name}", 1) - 1
        if not self._alone:
            self._store.set(key, str(number))
        return number

    def _key(self, number: int) -> str:
        return f"{self._place}/{self._name}/{self._team}/{number}"
