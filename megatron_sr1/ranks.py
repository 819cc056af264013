"""Ranks that work together, as those see them who know of no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Element = TypeVar("Element")


class Ranks(Protocol):
    """Ranks that do something together, and this one's place among them."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def gather(self, items: list[Element]) -> list[Element]:
        """All ranks' items on every rank, in the order of the ranks. Collective."""
        ...


class Exchange(Ranks, Protocol):
    """Ranks that send each other numbers without making objects of them."""

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All ranks' rows [n, W] of numbers, of one width and dtype, in the order of the ranks. Collective."""
        ...

    def swap(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """What each rank has for this one, for one piece [n] for each rank, all of one dtype. Collective.

        Args:
            sizes: of what comes, by rank: both sides know it.
        """
        ...


class Counter(Protocol):
    """Numbers from 0 on, each of which one engine draws."""

    def begin(self, name: str) -> None:
        """Goes on with another counter, from 0; every rank begins the same."""
        ...

    def next(self) -> int:
        """The next number that no engine has drawn; the ranks of an engine get the same."""
        ...


@dataclass(frozen=True)
class OneRank:
    """`Exchange` of a process that works alone."""

    rank: int = 0
    num_ranks: int = 1

    def gather(self, items: list[Element]) -> list[Element]:
        """The items."""
        return items

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows

    def swap(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """The piece."""
        return list(pieces)


ALONE = OneRank()


def agreed(ranks: Ranks, work: Callable[[], Element]) -> Element:
    """What this rank's part of a work gives, or the first complaint of any rank's on every rank. Collective.

    Raises:
        ValueError: the work did, on some rank; of the same class.
    """
    result: list[Element] = []
    refused: list[tuple[type[ValueError], str]] = []
    try:
        result = [work()]
    except ValueError as error:
        refused = [(type(error), str(error))]
    for kind, text in ranks.gather(refused):
        try:
            complaint = kind(text)
        except TypeError:  # a class that is made of more than a text
            complaint = ValueError(text)
        raise complaint
    return result[0]
