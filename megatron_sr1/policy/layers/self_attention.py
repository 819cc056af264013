"""Self-attention whose rotary embedding belongs to a token, not to its place in the packed row."""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_sr1.policy.layers.rotary import turned


class PackedSelfAttention(SelfAttention):
    """Turns queries and keys by their own angles as soon as they are made.

    Megatron turns them later, once the row is taken apart by cu_seqlens, by angles that it looks up by place; with
    mRoPE positions and context parallelism that lookup is wrong. Angles per local token need no lookup at all.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, rotary_pos_emb: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [T_local, 1, H] (a part under sequence parallelism), rotary_pos_emb [T_local, 1, 1, d]."""
        self._angles = rotary_pos_emb
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **options)

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        """Query [T_local, 1, h, d], key and value [T_local, 1, g, d]."""
        made: Any = super().get_query_key_value_tensors(*arguments, **options)
        query, key, value = made
        if self.config.apply_rope_fusion:
            query, key = (
                apply_rotary_pos_emb(x, self._angles, self.config, cp_group=self.pg_collection.cp) for x in (query, key)
            )
        else:
            cos, sin = (part.to(query.dtype) for part in (self._angles.cos(), self._angles.sin()))
            query, key = turned(query, cos, sin), turned(key, cos, sin)
        return query, key, value
