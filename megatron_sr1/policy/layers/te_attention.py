"""Transformer Engine's attention, but for rows whose sequences share prefixes."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sr1.policy.layers.deepstack import PackedRow
from megatron_sr1.policy.layers.prefix_attention import attend_to_prefixes


class TePrefixAttention(TEDotProductAttention):
    """Transformer Engine has no log-sum-exp to join calls by: rows with shared prefixes take torch's FlashAttention."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        groups, self._scale = options.get("pg_collection"), options.get("softmax_scale")
        self._context_group = groups.cp if groups is not None and config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *arguments: Any,
        packed_seq_params: PackedRow,
        **options: Any,
    ) -> Tensor:
        """query [T / c, h, d], key and value [T / c, g, d] -> [T / c, h * d]."""
        if packed_seq_params.calls:
            return attend_to_prefixes(query, key, value, packed_seq_params, self._context_group, self._scale)
        return super().forward(query, key, value, *arguments, packed_seq_params=packed_seq_params, **options)
