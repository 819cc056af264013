"""Megatron-Core's layer configuration: what the model, the layout, the precision and recomputation each ask for."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.config import Config, ConfigError, LayoutConfig, RecomputeConfig
from megatron_sr1.platform.precision import megatron_precision
from megatron_sr1.policy.architecture import Architecture

_ONLY_TE = {"layernorm", "moe_act"}


def transformer_config(architecture: Architecture, config: Config, *, spec: str, on_cpu: bool) -> TransformerConfig:
    """The language model's layers.

    Args:
        spec: "te" or "torch", the layers that will be built.
    """
    fused = spec == "te" and config.model.fused
    return TransformerConfig(
        **architecture_fields(architecture),
        **megatron_precision(config.precision),
        **_layout_fields(config.layout),
        **_recompute_fields(config.recompute, spec),
        bias_activation_fusion=fused,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # the layers' own: see DeepstackLayer
        apply_rope_fusion=spec == "te",
        moe_grouped_gemm=spec == "te" and architecture.num_experts > 0,
        deterministic_mode=config.precision.deterministic,
        perform_initialization=False,  # the weights are loaded
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,  # losses arrive divided by their global denominators: the schedule only adds
    )


def architecture_fields(architecture: Architecture) -> dict[str, Any]:
    """The arguments of Megatron-Core's TransformerConfig that follow from the model alone.

    Layout, precision and recompute are added by the caller. No loss term balances the experts: the objective is the
    caller's and nothing else.
    """
    fields: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "qk_layernorm": architecture.family.qk_norm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.hf.text_config.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.family.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_output_gate": architecture.family.output_gate,
        "layernorm_zero_centered_gamma": architecture.family.zero_centred_norms,
        "hetereogenous_dist_checkpoint": any(architecture.linear_layers),  # layers that differ are not stacked
    }
    moe_layers = architecture.moe_layers
    if any(moe_layers):
        fields |= {
            "num_moe_experts": architecture.num_experts,
            "moe_ffn_hidden_size": architecture.expert_ffn_size,
            "moe_layer_freq": 1 if all(moe_layers) else [int(is_moe) for is_moe in moe_layers],
            "moe_router_topk": architecture.experts_per_token,
            # transformers: softmax over all experts, then the chosen ones divided by their sum; that is the softmax
            # over the chosen ones
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "softmax",
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    if architecture.shared_expert_size:
        fields |= {
            "moe_shared_expert_intermediate_size": architecture.shared_expert_size,
            "moe_shared_expert_gate": True,
        }
    return fields


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
