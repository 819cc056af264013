"""Self-attention whose rotary embedding belongs to a token, not to its place in the packed row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
        """hidden_states [T_local, 1, H] (a part under sequence parallelism), rotary_pos_emb [T_local, 1, 1, d] of the d
        channels that are turned."""
        self._angles = rotary_pos_emb
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **options)

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        """Query [T_local, 1, h, d], key and value [T_local, 1, g, d]; where the model has it, the gate of the output,
        [T_local, 1, h, d]."""
        made: Any = super().get_query_key_value_tensors(*arguments, **options)
        query, key, value, *gates = made
        if self.config.apply_rope_fusion:
            query, key = (self._turned(x, self._fused) for x in (query, key))
        else:
            cos, sin = (part.to(query.dtype) for part in (self._angles.cos(), self._angles.sin()))
            query, key = (self._turned(x, lambda part: turned(part, cos, sin)) for x in (query, key))
        return query, key, value, *(self._of_heads(gate, query) for gate in gates)

    def _turned(self, x: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
        """Where the angles are of the first channels alone, the others stay."""
        size = self._angles.shape[-1]
        if size == x.shape[-1]:
            return turn(x)
        return torch.cat([turn(x[..., :size].contiguous()), x[..., size:]], dim=-1)

    def _fused(self, x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, self._angles, self.config, cp_group=self.pg_collection.cp)

    def _of_heads(self, gate: Tensor, query: Tensor) -> Tensor:
        """With more ranks than key/value heads Megatron-Core gives the queries of this rank's heads, and the gates of
        all that share the key."""
        heads = query.shape[2]
        first = self.pg_collection.tp.rank() * heads % gate.shape[2]
        return gate[:, :, first : first + heads]
