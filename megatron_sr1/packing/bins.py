"""Which sequences share a packed row, and which a data-parallel rank. Deterministic: equal input, equal output."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.types import TokenSequence


def sequence_length(sequence: TokenSequence) -> int:
    """Tokens of prompt and response."""
    return len(sequence.prompt_ids) + len(sequence.response_ids)


def fill_rows(sequences: Sequence[TokenSequence], *, max_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each row, in increasing order; each sequence is in one row.

    First-fit decreasing. What is placed is a family, the sequences that hold the same images, whole where it fits into
    a row: the row then encodes the images once for all of them. Rows are not padded to max_tokens, so a row more
    costs less than an image encoded again. Data-parallel replicas may differ in their number of rows: gradients meet
    once, after the last of each.

    Raises:
        ValueError: a sequence is longer than max_tokens.
    """
    lengths = [sequence_length(sequence) for sequence in sequences]
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens, more than the max_tokens={max_tokens} of a row. "
                "Raise the token budget of a row, or shorten prompts or responses."
            )
    rows: list[list[int]] = []
    room: list[int] = []
    for family in _families(sequences, lengths, max_tokens):
        size = sum(lengths[index] for index in family)
        row = next((row for row in range(len(rows)) if room[row] >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].extend(family)
        room[row] -= size
    return [sorted(row) for row in rows]


def split_for_ranks(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deals items (sequences, or groups of siblings that share images) to ranks, balanced by their tokens.

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
    loads = [(0, 0, rank) for rank in range(num_ranks)]  # tokens, items, rank
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        tokens, items, rank = min(loads)
        ranks[rank].append(index)
        loads[rank] = (tokens + lengths[index], items + 1, rank)
    return [sorted(rank) for rank in ranks]


def _families(sequences: Sequence[TokenSequence], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices by shared images, in parts of at most max_tokens, the part with the most tokens first."""
    families: dict[tuple[int, ...], list[list[int]]] = {}
    for index, sequence in enumerate(sequences):
        # Negative numbers are no object's identity: a sequence without images is a family of its own.
        identity = tuple(id(image) for image in sequence.images) or (-1 - index,)
        parts = families.setdefault(identity, [[]])
        if sum(lengths[member] for member in parts[-1]) + lengths[index] > max_tokens:
            parts.append([])
        parts[-1].append(index)
    everything = [part for parts in families.values() for part in parts]
    return sorted(everything, key=lambda part: (-sum(lengths[index] for index in part), part[0]))
