"""The layer spec of the language model on GPUs: Transformer Engine's layers.

Norms are fused into the linear that follows (where it is one), attention takes packed rows (THD) and context
parallelism (rows with shared prefixes: te_attention.py), the experts of a mixture are grouped matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_sr1.config import LinearAttention
from megatron_sr1.policy.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_sr1.policy.layers.torch_layers import moe_pattern


def te_layer_spec(
    config: TransformerConfig, *, is_moe: bool = False, linear: LinearAttention | None = None
) -> ModuleSpec:
    """One layer: dense, or with the experts of `config`. Each call gives a new one, so that its parts may be replaced.

    Args:
        linear: the sizes of a gated delta rule that is there in place of attention.

    Raises:
        ImportError: Transformer Engine is absent or does not load.
    """
    # Megatron-Core passes over a Transformer Engine that does not load; what is wrong with it shows here
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from megatron_sr1.policy.layers.te_attention import TePrefixAttention

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=is_moe,
        qk_layernorm=config.qk_layernorm,
    )
    layer: Any = spec.submodules
    layer.self_attention.submodules.core_attention = TePrefixAttention
    if linear is not None:
        from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

        parts = GatedDeltaNetSubmodules(in_proj=TELayerNormColumnParallelLinear, out_proj=TERowParallelLinear)
        layer.self_attention = ModuleSpec(GatedDeltaNet, {"sizes": linear}, parts)
    return spec


def te_block_spec(
    config: TransformerConfig, num_layers: int, vp_stage: int | None, linear: Sequence[LinearAttention | None]
) -> TransformerBlockSubmodules:
    """The `num_layers` layers and final norm of a chunk: this pipeline rank's, or its `vp_stage`-th where there is a
    virtual pipeline. `linear`: see `torch_block_spec`."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    kinds = zip(moe_pattern(config, num_layers, vp_stage), linear[first : first + num_layers], strict=True)
    layers = [te_layer_spec(config, is_moe=is_moe, linear=sizes) for is_moe, sizes in kinds]
    from megatron.core.extensions.transformer_engine import TENorm

    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
