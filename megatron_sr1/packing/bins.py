"""Which sequences share a packed row, and which a data-parallel rank. Deterministic: equal input, equal output."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.types import TokenSequence


def sequence_length(sequence: TokenSequence) -> int:
    """Tokens of prompt and response."""
    return len(sequence.prompt_ids) + len(sequence.response_ids)


def rows_needed(sequences: Sequence[TokenSequence], *, max_tokens: int) -> int:
    """How many rows `pack` makes where no number is forced.

    All data-parallel ranks must run the same number of micro-batches: take the maximum over the ranks and give it to
    `pack(..., num_rows=...)` on each.

    Raises:
        ValueError: a sequence is longer than max_tokens.
    """
    return len(fill_rows(sequences, max_tokens=max_tokens))


def fill_rows(sequences: Sequence[TokenSequence], *, max_tokens: int, num_rows: int | None = None) -> list[list[int]]:
    """Indices of the sequences of each row, in increasing order; each sequence is in one row.

    First-fit decreasing. What is placed is a family, the sequences that hold the same images, whole where it fits into
    a row: the row then encodes the images once for all of them. Rows are not padded to max_tokens, so a row more
    costs less than an image encoded again. To reach `num_rows`, the row with the most tokens is halved, again and
    again.

    Raises:
        ValueError: a sequence is longer than max_tokens; num_rows is too few, or more than there are sequences.
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
    if num_rows is not None:
        rows = _split_to(rows, lengths, num_rows, max_tokens)
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


def _split_to(rows: list[list[int]], lengths: Sequence[int], num_rows: int, max_tokens: int) -> list[list[int]]:
    num_sequences = sum(len(row) for row in rows)
    if num_rows < len(rows):
        raise ValueError(
            f"num_rows={num_rows} is too few: {num_sequences} sequences need {len(rows)} rows of max_tokens="
            f"{max_tokens}. Force the maximum of rows_needed over the ranks."
        )
    if num_rows > num_sequences:
        raise ValueError(
            f"num_rows={num_rows} is more than the {num_sequences} sequences, and a row without any has nothing to "
            "score. Give every data-parallel rank more sequences (a larger batch or fewer ranks), or raise the token "
            "budget of a row so that the others need fewer."
        )
    rows = [list(row) for row in rows]
    while len(rows) < num_rows:
        heaviest = max(
            (row for row in range(len(rows)) if len(rows[row]) > 1),
            key=lambda row: (sum(lengths[index] for index in rows[row]), -row),
        )
        rows[heaviest : heaviest + 1] = _halve(rows[heaviest], lengths)
    return rows


def _halve(row: list[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two non-empty halves, cut where their token counts are closest. A family is in one piece in `row`: a cut goes
    through one at most."""
    total = sum(lengths[index] for index in row)
    before, best, cut = 0, total + 1, 1
    for place in range(1, len(row)):
        before += lengths[row[place - 1]]
        if abs(total - 2 * before) < best:
            best, cut = abs(total - 2 * before), place
    return row[:cut], row[cut:]
