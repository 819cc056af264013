"""Rows of all ranks on every rank, with the gradients that go with it.

One collective each way. The ranks hold different numbers of rows; all know all of them, so no sizes are sent: parts are
padded to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_for_all(local: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """[sum(sizes), ...]: every rank's rows in the order of the ranks, for different work on every rank.

    Each rank's gradient is its own contribution, so backward adds them up over the group and returns this rank's rows.

    Args:
        local: [sizes[rank], ...].
        sizes: rows of each rank.
        group: of the ranks.
    """
    return local if group.size() == 1 else _GatherForAll.apply(local, sizes, group)


def gather_copies(local: Tensor, sizes: Sequence[int], group: ProcessGroup, context_group: ProcessGroup) -> Tensor:
    """[sum(sizes), ...]: every rank's rows in the order of the ranks, for a model that `group` shares.

    Tensor-parallel ranks do the same with the rows and hold the same gradient, the full one of their part of the
    sequence; context-parallel ranks hold the other parts'. So backward adds up over `context_group`, a part of
    `group`, and returns this rank's rows.
    """
    return local if group.size() == 1 else _GatherCopies.apply(local, sizes, group, context_group)


class _GatherForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _all_gather(local, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        longest = max(ctx.sizes)
        padded = gradient.new_zeros((len(ctx.sizes), longest, *gradient.shape[1:]))
        for part, rows in zip(padded, gradient.split(list(ctx.sizes)), strict=True):
            part[: len(rows)] = rows
        own = torch.empty_like(padded[0])
        torch.distributed.reduce_scatter_tensor(own, padded.flatten(0, 1), group=ctx.group)
        return own[: ctx.sizes[ctx.group.rank()]], None, None


class _GatherCopies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local: Tensor, sizes: Sequence[int], group: ProcessGroup, context_group: ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.rank, ctx.context_group = sizes, group.rank(), context_group
        return _all_gather(local, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.context_group.size() > 1:
            gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need the other
            torch.distributed.all_reduce(gradient, group=ctx.context_group)
        start = sum(ctx.sizes[: ctx.rank])
        return gradient[start : start + ctx.sizes[ctx.rank]], None, None, None


def _all_gather(local: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    assert len(local) == sizes[group.rank()], f"{len(local)} rows, announced were {sizes[group.rank()]}"
    longest = max(sizes)
    if len(local) < longest:
        local = torch.cat([local, local.new_zeros((longest - len(local), *local.shape[1:]))])
    gathered = local.new_empty((len(sizes), longest, *local.shape[1:]))
    torch.distributed.all_gather_into_tensor(gathered.flatten(0, 1), local.contiguous(), group=group)
    if min(sizes) == longest:
        return gathered.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
