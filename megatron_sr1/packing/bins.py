"""Which sequences share a packed row, and which a data-parallel rank. Deterministic: equal input, equal output."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_sr1.types import TokenSequence

FULL = 0.96  # share of the budget of all rows but one, below which families are broken up
MAX_IMBALANCE = 1.05  # tokens of the fullest rank over the mean, above which groups are cut
FINER = 0.85  # of the tokens of a run, from one way to cut groups to the next
MAX_TRIALS = 32  # ways to fill the rows that are tried, about
LEAST_SHARED = 16  # tokens of a prefix: below, a second call of attention costs more than they do
REPEATED = 0.01  # share of all tokens that is had twice to fill rows, at most


def sequence_length(sequence: TokenSequence) -> int:
    """Tokens of prompt and response."""
    return len(sequence.prompt_ids) + len(sequence.response_ids)


@dataclass(frozen=True)
class Part:
    """Sequences that are placed together. What they begin with, `shared` tokens, is in a row once."""

    shared: int
    indices: tuple[int, ...]  # increasing

    def tokens(self, lengths: Sequence[int]) -> int:
        """Of a row, given those of each sequence."""
        return self.shared + sum(lengths[index] - self.shared for index in self.indices)

    def of(self, indices: Sequence[int]) -> Part:
        """Some of the sequences; one alone shares nothing."""
        return Part(self.shared if len(indices) > 1 else 0, tuple(indices))

    def singles(self) -> list[Part]:
        return [self.of([index]) for index in self.indices]

    def broken(self) -> list[Part]:
        """Into its sequences, or into halves where they share a prefix."""
        middle = (len(self.indices) + 1) // 2
        return [self.of(self.indices[:middle]), self.of(self.indices[middle:])] if self.shared else self.singles()


def fill_rows(
    sequences: Sequence[TokenSequence], *, max_tokens: int, sequence_multiple: int = 1, share_prefix: bool = False
) -> list[list[Part]]:
    """The parts of each row, in the order of their first sequences; each sequence is in one part.

    What is placed is a family, whole where it fits into a row: see `families`. First-fit decreasing. A row is not
    padded to max_tokens, so one part-filled row costs less than what a family in two rows has twice; many do not. Where
    all rows but one are less than FULL, families are broken up to fill the gaps, those with the least to repeat first,
    and no more than needed: images are encoded again, and where prefixes are shared, those of halves are there twice,
    up to REPEATED. Batches of two passes hardly need it, for second passes have no images and fill any gap; batches of
    first passes alone do. What it costs and gains: `benchmarks/packing.py`.

    Data-parallel replicas may differ in their number of rows: gradients meet once, after the last of each.

    Args:
        sequence_multiple: segments count as padded to a multiple of it.
        share_prefix: what a family begins with is in a row once.

    Raises:
        ValueError: a sequence, padded, is longer than max_tokens.
    """
    lengths = _padded_lengths(sequences, max_tokens, sequence_multiple)
    found = families(sequences, sequence_multiple if share_prefix else None)
    num_several = sum(len(family.indices) > 1 for family in found)
    total = sum(family.tokens(lengths) for family in found)
    enough = 1 + int(total / (FULL * max_tokens))
    step = max(1, num_several // MAX_TRIALS)
    trials: list[list[list[Part]]] = []
    for num_broken in range(0, num_several + step, step):
        broken, kept = found[:num_broken], found[num_broken:]
        if trials and sum(family.shared for family in broken) > REPEATED * total:
            break
        halves = [part for family in broken for part in family.broken()]
        parts = [piece for part in (*kept, *halves) for piece in _pieces(part, lengths, max_tokens)]
        trials.append(_first_fit(parts, lengths, max_tokens))
        if len(trials[-1]) <= enough:
            break
    return [_in_order(row) for row in min(trials, key=len)]


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
    prompt: int = 0  # tokens that each run of those that see has once

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max([*(self.prompt + own for own in self.seeing), *self.blind], default=0)


@dataclass(frozen=True)
class _Run:
    """Sequences of a group that go to one rank."""

    tokens: int
    places: tuple[tuple[int, int], ...]  # group, number in it


def split_groups(groups: Sequence[Family], num_ranks: int) -> list[list[tuple[int, int]]]:
    """Assigns sequences to ranks, balanced by their tokens. Groups stay whole where that is balanced; else first the
    sequences without images are dealt one by one, which costs nothing, and then those that share images are cut into as
    few runs as balance the ranks, each of which has the images encoded, and the prompt where that is shared.

    Returns:
        For each rank (group, number in it) of its sequences, in order; those that see come first in the numbers. No
        rank is without one where there are as many sequences as ranks.
    """
    best: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    least, mean = (num_ranks, math.inf), 0.0
    longest = max((group.longest for group in groups), default=0)  # which some rank has
    for number, runs in enumerate(_cuts(groups)):
        tokens = [run.tokens for run in runs]
        if number == 0:
            mean = sum(tokens) / num_ranks
        ranks = split_for_ranks(tokens, num_ranks)
        fullest = max(sum(tokens[index] for index in rank) for rank in ranks)
        found = (sum(not rank for rank in ranks), fullest)  # a rank without work is worst
        if found < least:
            least, best = found, [sorted(place for index in rank for place in runs[index].places) for rank in ranks]
        if least <= (0, max(MAX_IMBALANCE * mean, longest)):
            break
    return best


def _cuts(groups: Sequence[Family]) -> Iterator[list[_Run]]:
    """Ways to cut all groups, from none on."""
    whole = [_runs(index, group, 1) for index, group in enumerate(groups)]
    singles = [_singles(index, group) for index, group in enumerate(groups)]
    yield [
        _Run(sum(run.tokens for run in runs), tuple(place for run in runs for place in run.places))
        for runs in ([*ours, *others] for ours, others in zip(whole, singles, strict=True))
        if runs  # a group without sequences keeps no rank busy
    ]
    alone = [run for others in singles for run in others]
    limit = max((group.prompt + sum(group.seeing) for group in groups), default=0)
    parts = [0] * len(groups)
    most = [len(group.seeing) for group in groups]
    while parts != most or not any(most):
        finer = [max(old, _parts(group, limit)) for old, group in zip(parts, groups, strict=True)]
        if finer != parts or not any(most):
            yield [run for index, group in enumerate(groups) for run in _runs(index, group, finer[index])] + alone
        if not any(most):
            return
        parts, limit = finer, limit * FINER


def _parts(group: Family, limit: float) -> int:
    """Runs of those that see of about `limit` tokens."""
    room = limit - group.prompt
    return min(len(group.seeing), max(1, math.ceil(sum(group.seeing) / room))) if room >= 1 else len(group.seeing)


def _runs(index: int, group: Family, parts: int) -> list[_Run]:
    """At most so many of about equal length, of those that see."""
    count = len(group.seeing)
    parts = min(parts, count)
    edges = [count * part // parts for part in range(parts + 1)] if parts else []
    return [
        _Run(group.prompt + sum(group.seeing[start:end]), tuple((index, number) for number in range(start, end)))
        for start, end in pairwise(edges)
    ]


def _singles(index: int, group: Family) -> list[_Run]:
    """The others."""
    return [_Run(count, ((index, number),)) for number, count in enumerate(group.blind, len(group.seeing))]


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


def families(sequences: Sequence[TokenSequence], multiple: int | None) -> list[Part]:
    """Sequences that have something in common, those of several first, from the fewest patches and tokens on.

    Without sharing, those that hold the same images, which a row encodes once. With it, those that have prompt and
    images in common; of the others, those that hold the same images or are of one group, and what their prompts begin
    with.

    Args:
        multiple: prefixes are shared, in multiples of so many tokens; None: they are not.
    """
    # Negative numbers are no object's identity: a sequence without images is a family of its own.
    seen = [tuple(id(image) for image in sequence.images) for sequence in sequences]
    alone = [identity or (-1 - index,) for index, identity in enumerate(seen)]
    found: list[Part] = []
    if multiple is None:
        found = [Part(0, indices) for indices in _grouped(range(len(sequences)), lambda index: alone[index])]
    else:
        asked = _grouped(range(len(sequences)), lambda index: (seen[index], tuple(sequences[index].prompt_ids)))
        same = [(indices, len(sequences[indices[0]].prompt_ids)) for indices in asked if len(indices) > 1]
        single = [indices[0] for indices in asked if len(indices) == 1]
        grouped = [(-1, group) if (group := sequence.group) is not None else None for sequence in sequences]
        others = _grouped(single, lambda index: seen[index] or grouped[index] or alone[index])
        alike = [(indices, _common([sequences[index].prompt_ids for index in indices])) for indices in others]
        for indices, common in (*same, *alike):
            shared = common // multiple * multiple
            worth = bool(indices[1:]) and shared >= LEAST_SHARED
            whole = worth or seen[indices[0]]
            found += [Part(shared * worth, indices)] if whole else [Part(0, (index,)) for index in indices]

    def price(part: Part) -> tuple[bool, int, int, int]:
        patches = sum(math.prod(image.grid_thw) for image in sequences[part.indices[0]].images)
        return len(part.indices) == 1, patches, part.shared, part.indices[0]

    return sorted(found, key=price)


def _grouped(indices: Iterable[int], key: Callable[[int], Hashable]) -> list[tuple[int, ...]]:
    found: dict[Hashable, list[int]] = {}
    for index in indices:
        found.setdefault(key(index), []).append(index)
    return [tuple(group) for group in found.values()]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Ids that all begin with."""
    # in the order of words: what the first and the last have in common, all between them have
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]
    return next((n for n, (ours, theirs) in enumerate(zip(first, last, strict=False)) if ours != theirs), len(first))


def _pieces(part: Part, lengths: list[int], max_tokens: int) -> list[Part]:
    """The part in as few pieces of at most max_tokens as its order allows."""
    pieces: list[list[int]] = [[]]
    room = max_tokens - part.shared
    for index in part.indices:
        if lengths[index] - part.shared > room:
            pieces.append([])
            room = max_tokens - part.shared
        pieces[-1].append(index)
        room -= lengths[index] - part.shared
    return [part.of(piece) for piece in pieces]


def _first_fit(parts: list[Part], lengths: list[int], max_tokens: int) -> list[list[Part]]:
    """Rows of whole parts: the part with the most tokens first, each into the first row with room for it."""
    sized = sorted((-part.tokens(lengths), part.indices, part) for part in parts)
    rows: list[list[Part]] = []
    rooms: list[int] = []
    for negative, _, part in sized:
        row = next((row for row, room in enumerate(rooms) if room >= -negative), len(rows))
        if row == len(rows):
            rows.append([])
            rooms.append(max_tokens)
        rows[row].append(part)
        rooms[row] += negative
    return rows


def _in_order(row: list[Part]) -> list[Part]:
    """By first sequence; of parts that share nothing each sequence is one."""
    parts = [piece for part in row for piece in ([part] if part.shared else part.singles())]
    return sorted(parts, key=lambda part: part.indices)
