"""Which tokens of a packed row each context-parallel rank holds.

Zigzag (Llama 3, arXiv 2407.21783, section 3.3.2): every segment is cut into 2 * size equal parts, and rank r takes
parts r and 2 * size - 1 - r, so that under a causal mask all ranks have the same work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_order(cu_seqlens: Tensor, size: int) -> Tensor:
    """Where the tokens of the row are among those of all context-parallel ranks, rank after rank: [T] int64."""
    return torch.argsort(torch.cat([context_index(cu_seqlens, rank, size) for rank in range(size)]))


def context_index(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Positions in the row of this rank's tokens, in its order: [T / size] int64.

    Args:
        cu_seqlens: [N+1], every segment a multiple of 2 * size long (1 where size is 1).

    Raises:
        ValueError: a segment does not divide.
    """
    starts = cu_seqlens[:-1].long()
    lengths = torch.diff(cu_seqlens.long())
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    if (lengths % (2 * size)).any():
        raise ValueError(
            f"sequences of {lengths.tolist()} tokens do not split over {size} context-parallel ranks: each must be a "
            f"multiple of {2 * size}. Pack with sequence_multiple={2 * size}."
        )
    parts = lengths // (2 * size)  # [N] tokens of one part
    firsts = torch.stack([starts + rank * parts, starts + (2 * size - 1 - rank) * parts], dim=1).flatten()  # [2N]
    counts = parts.repeat_interleave(2)
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum()), device=firsts.device) + (firsts - before).repeat_interleave(counts)
