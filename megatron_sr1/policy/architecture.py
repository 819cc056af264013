"""From a Hugging Face config.json to Megatron-Core's transformer configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen2_5_VLConfig

from megatron_sr1.config import LayoutConfig

SUPPORTED = ("Qwen2_5_VLForConditionalGeneration",)


@dataclass(frozen=True)
class Architecture:
    """What the policy needs to know about a model, beside its layer configuration."""

    hf: Qwen2_5_VLConfig
    vocab_size: int
    tied: bool

    @property
    def num_layers(self) -> int:
        return self.hf.text_config.num_hidden_layers

    @property
    def num_heads(self) -> int:
        return self.hf.text_config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.hf.text_config.num_key_value_heads


def read_architecture(hf_dir: str) -> Architecture:
    """Reads `hf_dir`/config.json, which `config.check_model` has found.

    Raises:
        ValueError: a model class that is not supported.
    """
    path = Path(hf_dir) / "config.json"
    names = json.loads(path.read_text()).get("architectures") or ["unnamed"]
    if names[0] not in SUPPORTED:
        raise ValueError(f"{path}: architecture {names[0]} is not supported. Supported: {', '.join(SUPPORTED)}.")
    hf = Qwen2_5_VLConfig.from_pretrained(hf_dir)
    return Architecture(
        hf=hf,
        vocab_size=hf.text_config.vocab_size,
        tied=hf.tie_word_embeddings,
    )


def transformer_config(architecture: Architecture, layout: LayoutConfig, on_cpu: bool) -> TransformerConfig:
    """The language model's layers, in fp32."""
    text = architecture.hf.text_config
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.hidden_size // text.num_attention_heads,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,  # the weights are loaded
        use_cpu_initialization=on_cpu,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=True,  # packed rows differ in length between micro-batches
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, in dense models too
        calculate_per_token_loss=True,  # losses arrive divided by their global denominators: the schedule only adds
    )
