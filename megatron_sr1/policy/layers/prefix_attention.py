"""Attention of a row whose sequences share prefixes, for both layer specs.

Shapes: T tokens of a packed row, c context-parallel ranks, h query heads and g key/value heads on this rank, d channels
of a head.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.policy.layers.deepstack import PackedRow
from megatron_sr1.policy.layers.joined_attention import joined_attention


def attend_to_prefixes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    context_group: ProcessGroup | None,
    scale: float | None,
) -> Tensor:
    """query [T / c, h, d], key and value [T / c, g, d] -> [T / c, h * d].

    Args:
        row: with its calls.
        context_group: None where c is 1.
    """
    if context_group is not None:
        assert row.order is not None
        key, value = of_all_ranks(key, value, row.order, context_group)
    return joined_attention(query, key, value, row.calls, scale).reshape(len(query), -1)


def of_all_ranks(key: Tensor, value: Tensor, order: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of all context-parallel ranks, [T, g, d] each, in the order of the row; their gradients are
    summed over the ranks on their way back.

    Args:
        order: see `packing.context.row_order`.
    """
    gathered = gather_from_sequence_parallel_region(
        torch.cat([key, value], dim=1), tensor_parallel_output_grad=True, group=group
    )
    keys, values = gathered[order].chunk(2, dim=1)
    return keys, values
