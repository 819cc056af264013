"""Threads that stand for ranks: what they gather meets like a collective."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_sr1.ranks import Exchange

Result = TypeVar("Result")


class Meeting:
    """Where the ranks meet; `sent` keeps what each has given, turn by turn."""

    def __init__(self, num_ranks: int) -> None:
        self.sent: list[list[list[Any]]] = [[] for _ in range(num_ranks)]
        self._barrier = threading.Barrier(num_ranks, timeout=60)

    def of(self, rank: int) -> ThreadRanks:
        """`ranks.Ranks` of the thread that stands for `rank`."""
        return ThreadRanks(rank, len(self.sent), self)

    def exchange(self, rank: int, items: list[Any]) -> list[Any]:
        self.sent[rank].append(items)
        turn = len(self.sent[rank]) - 1
        self._barrier.wait()
        everything = [item for sent in self.sent for item in sent[turn]]
        self._barrier.wait()
        return everything


@dataclass(frozen=True)
class ThreadRanks:
    rank: int
    num_ranks: int
    meeting: Meeting

    def gather(self, items: list[Any]) -> list[Any]:
        return self.meeting.exchange(self.rank, items)

    def gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat(self.gather([rows]))

    def swap(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        received = [each[self.rank] for each in self.gather([list(pieces)])]
        assert [len(piece) for piece in received] == list(sizes), "both sides know the sizes"
        return received


def on_threads(num_ranks: int, work: Callable[[Exchange], Result]) -> list[Result]:
    """What each of the ranks gives."""
    meeting = Meeting(num_ranks)
    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(lambda rank: work(meeting.of(rank)), range(num_ranks)))
