"""The layer spec of the language model where Transformer Engine is absent: plain torch modules that know packed rows
and sequence parallelism, dense or with a mixture of experts.

The distributed checkpoints of these layers have the names that Transformer Engine's layers give theirs, so that either
loads what the other saved; the names of the parameters themselves are not touched.

Shapes: T tokens of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_sr1.config import LinearAttention
from megatron_sr1.platform.megatron_private import name_missing_gemm
from megatron_sr1.platform.norm import rms_norm
from megatron_sr1.policy.layers.core_attention import PackedCausalAttention
from megatron_sr1.policy.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules

# Transformer Engine fuses a norm into the linear layer behind it; the norm before experts stands for itself there too
_FUSED_INPUT_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_FUSED_DELTA_NORM = {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
_FUSED_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
name_missing_gemm()


class RMSNorm(torch.nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) in fp32, aware of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma  # the factor is 1 + weight
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradient of a marked weight over the tensor-parallel ranks, which each see a part of T
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        weight = self.weight.float() + 1 if self.zero_centred else self.weight.float()
        return rms_norm(hidden.float(), weight, self.eps).to(hidden.dtype)


def torch_layer_spec(
    config: TransformerConfig, *, is_moe: bool = False, linear: LinearAttention | None = None
) -> ModuleSpec:
    """The spec of one layer: dense, or with the experts of `config`, each a module of its own.

    Args:
        linear: the sizes of a gated delta rule that is there in place of attention.
    """
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedCausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    input_norm = _FUSED_INPUT_NORM
    if linear is not None:
        parts = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
        submodules: Any = layer.submodules
        submodules.self_attention = ModuleSpec(GatedDeltaNet, {"sizes": linear}, parts)
        input_norm = _FUSED_DELTA_NORM
    layer.submodules.sharded_state_dict_keys_map = input_norm | ({} if is_moe else _FUSED_MLP_NORM)
    return layer


def torch_block_spec(
    config: TransformerConfig, num_layers: int, vp_stage: int | None, linear: Sequence[LinearAttention | None]
) -> TransformerBlockSubmodules:
    """The spec of the `num_layers` layers and final norm of a chunk: this pipeline rank's, or its `vp_stage`-th where
    there is a virtual pipeline.

    Args:
        linear: of each layer of the model, the sizes of the gated delta rule that it has in place of attention.
    """
    pattern = moe_pattern(config, num_layers, vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    kinds = zip(pattern, linear[first : first + num_layers], strict=True)
    layers = [torch_layer_spec(config, is_moe=is_moe, linear=sizes) for is_moe, sizes in kinds]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def moe_pattern(config: TransformerConfig, num_layers: int, vp_stage: int | None) -> list[bool]:
    """Which of a chunk's `num_layers` layers have experts."""
    if config.num_moe_experts is None:
        return [False] * num_layers
    if config.moe_layer_freq == 1:
        return [True] * num_layers
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return [bool(is_moe) for is_moe in config.moe_layer_freq[first : first + num_layers]]
