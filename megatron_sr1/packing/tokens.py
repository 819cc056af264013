"""Per-token values of responses: from packed rows back to sequences, and from sequences into packed rows.

R  scored tokens of a row     n  response tokens of a sequence     ...  any leading dimensions, the same throughout
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.types import MicroBatch


def gather_rows(values_per_row: Sequence[Tensor], batches: Sequence[MicroBatch], num_sequences: int) -> list[Tensor]:
    """Results of the packed rows, by sequence and in the order of the response.

    Args:
        values_per_row: one [..., R] for each of `batches`, which must be all the rows of one `pack`.
        num_sequences: how many were packed.

    Returns:
        num_sequences tensors [..., n].

    Raises:
        ValueError: values and rows differ in number or length, or a response token is missing or there twice.
    """
    if len(values_per_row) != len(batches):
        raise ValueError(f"{len(values_per_row)} values for {len(batches)} rows; give one tensor for each row.")
    for number, (value, batch) in enumerate(zip(values_per_row, batches, strict=True)):
        if value.shape[-1] != len(batch.targets):
            raise ValueError(
                f"values of row {number} have shape {tuple(value.shape)}; the last size must be the "
                f"{len(batch.targets)} scored tokens of the row."
            )
    if not batches:
        return [torch.empty(0) for _ in range(num_sequences)]
    sequence = torch.cat([batch.row_sequence for batch in batches])
    offset = torch.cat([batch.row_offset for batch in batches])
    counts = torch.bincount(sequence, minlength=num_sequences)
    starts = counts.cumsum(0) - counts
    if len(counts) != num_sequences:
        raise ValueError(f"the rows hold sequence {len(counts) - 1}, but num_sequences={num_sequences} were packed.")
    order = torch.argsort(starts[sequence] + offset, stable=True)
    expected = torch.arange(len(order), device=order.device) - starts.repeat_interleave(counts)
    if not torch.equal(offset[order], expected):
        raise ValueError("a response token is missing from the rows or there twice; give all rows of one pack, once.")
    values = torch.cat(list(values_per_row), dim=-1)
    return list(values.index_select(-1, order.to(values.device)).split(counts.tolist(), dim=-1))


def scatter_rows(values_per_sequence: Sequence[Tensor], batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Per-sequence values [..., n], in the order that was packed, to one [..., R] per row: undoes `gather_rows`.

    Raises:
        ValueError: a sequence has not as many values as response tokens in the rows, which must be all of one `pack`.
    """
    if not batches:
        return []
    sizes = [value.shape[-1] for value in values_per_sequence]
    lengths = torch.tensor(sizes, dtype=torch.int64, device=batches[0].row_sequence.device)
    starts = lengths.cumsum(0) - lengths
    counts = torch.cat([batch.row_sequence for batch in batches]).bincount(minlength=len(lengths))
    if not torch.equal(counts, lengths):
        raise ValueError(
            f"the sequences have {lengths.tolist()} values for {counts.tolist()} response tokens; each needs one for "
            "every response token, in the order that was packed."
        )
    values = torch.cat(list(values_per_sequence), dim=-1)
    indices = [starts[batch.row_sequence] + batch.row_offset for batch in batches]
    return [values.index_select(-1, index.to(values.device)) for index in indices]
