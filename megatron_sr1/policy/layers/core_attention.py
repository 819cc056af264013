"""Attention of a packed row by torch's own scaled dot-product attention, for machines without Transformer Engine.

Shapes: T tokens of a packed row, c context-parallel ranks, h query heads and g key/value heads on this rank, d channels
of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sr1.packing.context import context_index, row_order
from megatron_sr1.policy.layers.deepstack import PackedRow
from megatron_sr1.policy.layers.prefix_attention import attend_to_prefixes, of_all_ranks

PADDING_LIMIT = 2.0  # one padded attention call is used while it computes at most this many times the real tokens


class PackedCausalAttention(torch.nn.Module):
    """Causal attention within each sequence of a packed row, whose prompt other sequences may share.

    Under context parallelism a rank holds the zigzag parts of every sequence (`packing.context`): keys and values are
    gathered, queries stay, and the gradient of keys and values is summed over the ranks on its way back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal) and attention_type == "self"
        self.softmax_scale = softmax_scale
        self.context_group = (
            pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedRow,
        **_: object,
    ) -> Tensor:
        """query [T / c, h, d], key and value [T / c, g, d] -> [T / c, h * d]."""
        cu_seqlens = packed_seq_params.cu_seqlens_q
        if packed_seq_params.calls:
            return attend_to_prefixes(query, key, value, packed_seq_params, self.context_group, self.softmax_scale)
        if self.context_group is not None:
            attended = self._across_ranks(query, key, value, cu_seqlens)
            return attended.reshape(len(query), -1)
        lengths = torch.diff(cu_seqlens)
        longest = packed_seq_params.max_seqlen_q
        if len(lengths) * longest <= PADDING_LIMIT * len(query):
            attended = self._padded(query, key, value, cu_seqlens, longest)
        else:
            sizes = lengths.tolist()
            parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
            attended = torch.cat([self._attend(*(x.transpose(0, 1) for x in part)).transpose(0, 1) for part in parts])
        return attended.reshape(len(query), -1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """All sequences in one call, padded on the right, where a causal mask already hides the padding."""
        starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
        index = starts + torch.arange(longest, device=query.device)  # [N, longest]
        real = index < ends
        index = index.clamp(max=len(query) - 1)
        attended = self._attend(*(x[index].transpose(1, 2) for x in (query, key, value)))  # [N, h, longest, d]
        return attended.transpose(1, 2)[real]

    def _across_ranks(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        """This rank's queries against the keys and values of all ranks."""
        assert self.context_group is not None
        size, rank = self.context_group.size(), self.context_group.rank()
        keys, values = of_all_ranks(key, value, row_order(cu_seqlens, size), self.context_group)
        mine = context_index(cu_seqlens, rank, size)
        sizes = (torch.diff(cu_seqlens) // (2 * size)).repeat_interleave(2).tolist()
        starts = cu_seqlens[:-1].long().repeat_interleave(2).tolist()
        attended = []
        for part, positions, start in zip(query.split(sizes), mine.split(sizes), starts, strict=True):
            end = int(positions[-1]) + 1
            seen = torch.arange(start, end, device=query.device) <= positions[:, None]  # [queries, keys]
            attended.append(
                self._attend(*(x.transpose(0, 1) for x in (part, keys[start:end], values[start:end])), seen)
            )
        return torch.cat([x.transpose(0, 1) for x in attended])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[-3] != key.shape[-3],
        )
