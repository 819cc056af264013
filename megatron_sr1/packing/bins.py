"""Which sequences share a packed row, and which a data-parallel rank. Deterministic: equal input, equal output."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from megatron_sr1.types import TokenSequence

_T = TypeVar("_T")
FULL = 0.96  # share of the budget of all rows but one, below which families are broken up
MAX_IMBALANCE = 1.05  # tokens of the fullest rank over the mean, above which groups are cut
MAX_TRIALS = 32  # ways to fill the rows that are tried, about


def sequence_length(sequence: TokenSequence) -> int:
    """Tokens of prompt and response."""
    return len(sequence.prompt_ids) + len(sequence.response_ids)


def fill_rows(sequences: Sequence[TokenSequence], *, max_tokens: int, sequence_multiple: int = 1) -> list[list[int]]:
    """Indices of the sequences of each row, in increasing order; each sequence is in one row.

    What is placed is a family, the sequences that hold the same images, whole where it fits into a row: the row then
    encodes the images once for all of them. First-fit decreasing. A row is not padded to max_tokens, so one part-filled
    row costs less than an image encoded again; many do not. Where all rows but one are less than FULL, families are
    broken up to fill the gaps, those with the fewest patches first, and no more than needed. Batches of two passes
    hardly need it, for second passes have no images and fill any gap; batches of first passes alone do. What it costs
    and gains: `benchmarks/packing.py`.

    Data-parallel replicas may differ in their number of rows: gradients meet once, after the last of each.

    Args:
        sequence_multiple: sequences count as padded to a multiple of it.

    Raises:
        ValueError: a sequence, padded, is longer than max_tokens.
    """
    lengths = _padded_lengths(sequences, max_tokens, sequence_multiple)
    families = _families(sequences)
    num_shared = sum(len(family) > 1 for family in families)
    total = sum(lengths)
    enough = 1 + int(total / (FULL * max_tokens))
    step = max(1, num_shared // MAX_TRIALS)
    trials: list[list[list[int]]] = []
    for num_broken in range(0, num_shared + step, step):
        whole = [part for family in families[num_broken:] for part in _parts(family, lengths, max_tokens)]
        single = [[index] for family in families[:num_broken] for index in family]
        trials.append(_first_fit(whole + single, lengths, max_tokens))
        if len(trials[-1]) <= enough:
            break
    return [sorted(row) for row in min(trials, key=len)]


def split_for_ranks(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Assigns items (sequences, or groups of siblings that share images) to ranks, balanced by their tokens.

    Longest first, each to the rank with the fewest tokens so far; with at least as many items as ranks, no rank is
    left without one.

    Args:
        lengths: tokens of each item.
        num_ranks: at least 1.

    Returns:
        num_ranks lists of indices into `lengths`, each increasing.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} is not allowed: it must be 1 or more.")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, 0, rank) for rank in range(num_ranks)]  # tokens, items, rank; a heap
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        tokens, items, rank = loads[0]
        ranks[rank].append(index)
        heapq.heapreplace(loads, (tokens + lengths[index], items + 1, rank))
    return [sorted(rank) for rank in ranks]


@dataclass(frozen=True)
class Family:
    """Tokens of the sequences of a group: of those that look at its images, and of the others."""

    seeing: Sequence[int]
    blind: Sequence[int] = ()


def split_groups(groups: Sequence[Family], num_ranks: int) -> list[list[tuple[int, int]]]:
    """Assigns sequences to ranks, balanced by their tokens. Groups stay whole where that is balanced; else first the
    sequences without images are dealt one by one, which costs nothing, and then those that share images are cut into as
    few runs as balance the ranks, for each of which the images are encoded.

    Returns:
        For each rank (group, number in it) of its sequences, in order; those that see come first in the numbers. No
        rank is without one where there are as many sequences as ranks.
    """
    best: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    least, mean = (num_ranks, math.inf), sum(sum(group.seeing) + sum(group.blind) for group in groups) / num_ranks
    for runs in _cuts(groups):
        tokens = [sum(count for _, count in run) for run in runs]
        ranks = split_for_ranks(tokens, num_ranks)
        fullest = max(sum(tokens[index] for index in rank) for rank in ranks)
        found = (
            sum(not rank for rank in ranks),
            fullest,
        )  # a rank without work is worst
        if found < least:
            least, best = found, [sorted(place for index in rank for place, _ in runs[index]) for rank in ranks]
        if least <= (0, MAX_IMBALANCE * mean):
            break
    return best


def _cuts(groups: Sequence[Family]) -> Iterator[list[list[tuple[tuple[int, int], int]]]]:
    """Ways to cut all groups, from none on: runs of (place, tokens)."""
    seeing = [[((index, n), count) for n, count in enumerate(group.seeing)] for index, group in enumerate(groups)]
    starts = enumerate(map(len, seeing))
    blind = [[((index, n), count) for n, count in enumerate(groups[index].blind, start)] for index, start in starts]
    yield [[*ours, *others] for ours, others in zip(seeing, blind, strict=True)]
    singles = [[each] for others in blind for each in others]
    parts, most = 1, max(map(len, seeing), default=0)
    while parts <= max(1, most):
        yield [run for ours in seeing for run in _runs(ours, parts)] + singles
        parts = max(parts + 1, min(most, parts * 5 // 4))


def _runs(items: list[_T], parts: int) -> list[list[_T]]:
    """At most so many runs of about equal length."""
    parts = min(parts, len(items))
    edges = [len(items) * part // parts for part in range(parts + 1)] if parts else []
    return [items[start:end] for start, end in pairwise(edges)]


def _padded_lengths(sequences: Sequence[TokenSequence], max_tokens: int, multiple: int) -> list[int]:
    lengths = [-(-sequence_length(sequence) // multiple) * multiple for sequence in sequences]
    for index, length in enumerate(lengths):
        if length > max_tokens:
            padded = f" ({length} when padded to a multiple of {multiple})" if multiple > 1 else ""
            raise ValueError(
                f"sequence {index} has {sequence_length(sequences[index])} tokens{padded}, more than the "
                f"max_tokens={max_tokens} of a row. Raise the token budget of a row, or shorten prompts or responses."
            )
    return lengths


def _families(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Indices by shared images: first the families of several, from the fewest patches on, then the sequences alone."""
    families: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        # Negative numbers are no object's identity: a sequence without images is a family of its own.
        identity = tuple(id(image) for image in sequence.images) or (-1 - index,)
        families.setdefault(identity, []).append(index)

    def price(family: list[int]) -> tuple[bool, int, int]:
        patches = sum(math.prod(image.grid_thw) for image in sequences[family[0]].images)
        return len(family) == 1, patches, family[0]

    return sorted(families.values(), key=price)


def _parts(family: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The family in as few pieces of at most max_tokens as its order allows."""
    parts: list[list[int]] = [[]]
    room = max_tokens
    for index in family:
        if lengths[index] > room:
            parts.append([])
            room = max_tokens
        parts[-1].append(index)
        room -= lengths[index]
    return parts


def _first_fit(parts: list[list[int]], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Rows of whole parts: the part with the most tokens first, each into the first row with room for it."""
    sized = sorted((-sum(lengths[index] for index in part), part[0], part) for part in parts)
    rows: list[list[int]] = []
    rooms: list[int] = []
    for negative, _, part in sized:
        row = next((row for row, room in enumerate(rooms) if room >= -negative), len(rows))
        if row == len(rows):
            rows.append([])
            rooms.append(max_tokens)
        rows[row].extend(part)
        rooms[row] += negative
    return rows
