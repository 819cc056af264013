"""The layer spec of the language model where Transformer Engine is absent: plain torch modules that know packed rows
and sequence parallelism.

Shapes: T tokens of a packed row, h query heads and g key/value heads on this rank, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

PADDING_LIMIT = 2.0  # one padded attention call is used while it computes at most this many times the real tokens


class RMSNorm(torch.nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) in fp32, aware of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradient of a marked weight over the tensor-parallel ranks, which each see a part of T
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, 1, H] -> [T, 1, H]."""
        return F.rms_norm(hidden.float(), (hidden.shape[-1],), self.weight.float(), self.eps).to(hidden.dtype)


class PackedCausalAttention(torch.nn.Module):
    """Causal attention within each sequence of a packed row, by torch's own scaled dot-product attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal) and attention_type == "self"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams,
        **_: object,
    ) -> Tensor:
        """query [T, h, d], key and value [T, g, d] -> [T, h * d]."""
        lengths = torch.diff(packed_seq_params.cu_seqlens_q)
        longest = packed_seq_params.max_seqlen_q
        if len(lengths) * longest <= PADDING_LIMIT * len(query):
            attended = self._padded(query, key, value, packed_seq_params.cu_seqlens_q, longest)
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

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[-3] != key.shape[-3]
        )


def torch_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """The spec of a stage's `num_layers` layers and final norm."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = PackedCausalAttention
    # Megatron's map renames norms after Transformer Engine's fused modules; there are none here
    layer.submodules.sharded_state_dict_keys_map = {}
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
