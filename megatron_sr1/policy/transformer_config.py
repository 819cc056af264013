"""Megatron-Core's layer configuration: what the model, the layout, the precision and recomputation each ask for."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.config import Config, ConfigError, LayoutConfig, RecomputeConfig
from megatron_sr1.platform.precision import megatron_precision
from megatron_sr1.policy.architecture import Architecture, architecture_fields

_ONLY_TE = {"layernorm", "moe_act"}


def transformer_config(architecture: Architecture, config: Config, *, spec: str, on_cpu: bool) -> TransformerConfig:
    """The language model's layers.

    Args:
        spec: "te" or "torch", the layers that will be built.
    """
    return TransformerConfig(
        **architecture_fields(architecture),
        **megatron_precision(config.precision),
        **_layout_fields(config.layout),
        **_recompute_fields(config.recompute, spec),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=spec == "te",
        moe_grouped_gemm=spec == "te" and architecture.num_experts > 0,
        perform_initialization=False,  # the weights are loaded
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,  # losses arrive divided by their global denominators: the schedule only adds
    )


def _layout_fields(layout: LayoutConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": layout.sequence_parallel,
        "variable_seq_lengths": True,  # packed rows differ in length between micro-batches
        "moe_token_dispatcher_type": "alltoall",  # variable_seq_lengths asks for it, in dense models too
    }
    if layout.virtual > 1:
        fields["virtual_pipeline_model_parallel_size"] = layout.virtual
        # with Megatron's defaults the interleaved schedule mixes up its messages and gives wrong gradients in silence
        fields.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if layout.stage_layers:
        chunks = [["decoder"] * number for number in layout.stage_layers]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        fields["pipeline_model_parallel_layout"] = chunks
    return fields


def _recompute_fields(recompute: RecomputeConfig, spec: str) -> dict[str, Any]:
    """Raises:
    ConfigError: a module that only Transformer Engine's layers can make again, with other layers.
    """
    if recompute.mode == "none":
        return {}
    if recompute.mode == "selective":
        impossible = sorted(_ONLY_TE.intersection(recompute.modules)) if spec == "torch" else []
        if impossible:
            raise ConfigError(
                f"recompute.modules={list(recompute.modules)} is not allowed with plain torch layers: "
                f"{', '.join(impossible)} is made again by Transformer Engine's only. Leave it out."
            )
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform" if recompute.mode == "full" else "block",
        "recompute_num_layers": recompute.layers,
    }
