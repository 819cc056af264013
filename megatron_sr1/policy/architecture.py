"""From a Hugging Face config.json to what the policy needs to know about a model.

Supported: every model whose config.json names one of the classes in FAMILIES. Whatever such a config asks for that the
policy does not compute the same way is refused here, by name, and never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from megatron_sr1.policy.supported import unsupported_settings


@dataclass(frozen=True)
class Family:
    """What the models of one Hugging Face class have in common, beyond their config.json."""

    name: str
    config_class: type[PreTrainedConfig]
    language_prefix: str  # of tensor names in a checkpoint, as published and as transformers saves them
    vision_prefix: str
    qk_norm: bool  # RMSNorm of each head's query and key, before the rotary embedding
    qkv_bias: bool
    own_head_dim: bool  # config.json may set head_dim; else it is hidden_size / num_attention_heads
    interleaved_rotary: bool  # mRoPE: time, height, width by turns along the frequencies; else in three sections
    has_experts: bool = False  # feed-forward parts may be mixtures of experts


_QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    config_class=Qwen2_5_VLConfig,
    language_prefix="model.",
    vision_prefix="visual.",
    qk_norm=False,
    qkv_bias=True,
    own_head_dim=False,
    interleaved_rotary=False,
)
_QWEN3_VL = Family(
    name="qwen3_vl",
    config_class=Qwen3VLConfig,
    language_prefix="model.language_model.",
    vision_prefix="model.visual.",
    qk_norm=True,
    qkv_bias=False,
    own_head_dim=True,
    interleaved_rotary=True,
)
FAMILIES: dict[str, Family] = {
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_5_VL,
    "Qwen3VLForConditionalGeneration": _QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": replace(
        _QWEN3_VL,
        name="qwen3_vl_moe",
        config_class=Qwen3VLMoeConfig,
        has_experts=True,
    ),
}


@dataclass(frozen=True)
class Architecture:
    """A model as its config.json describes it. `hf` is the configuration that transformers made of it."""

    hf: Any  # one of the family's config_class
    family: Family

    @property
    def num_layers(self) -> int:
        return self.hf.text_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.hf.text_config.hidden_size

    @property
    def ffn_size(self) -> int:
        """Width of a dense layer's feed-forward part."""
        return self.hf.text_config.intermediate_size

    @property
    def num_heads(self) -> int:
        return self.hf.text_config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.hf.text_config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head; heads together need not be as wide as the hidden state (Qwen3-VL-4B, 32B, 30B-A3B)."""
        text = self.hf.text_config.to_dict()
        return text.get("head_dim") or self.hidden_size // self.num_heads

    @property
    def vocab_size(self) -> int:
        return self.hf.text_config.vocab_size

    @property
    def tied(self) -> bool:
        """The head is the transposed embedding."""
        return self.hf.tie_word_embeddings

    @property
    def qk_norm(self) -> bool:
        return self.family.qk_norm

    @property
    def qkv_bias(self) -> bool:
        return self.family.qkv_bias

    @property
    def language_prefix(self) -> str:
        return self.family.language_prefix

    @property
    def vision_prefix(self) -> str:
        return self.family.vision_prefix

    @property
    def num_experts(self) -> int:
        """0 for a dense model."""
        return self.hf.text_config.num_experts if self.family.has_experts else 0

    @property
    def expert_ffn_size(self) -> int:
        """Width of one expert; 0 for a dense model."""
        return self.hf.text_config.moe_intermediate_size if self.num_experts else 0

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """For each layer: is its feed-forward part a mixture of experts (transformers, Qwen3VLMoeTextDecoderLayer)."""
        text = self.hf.text_config
        if not self.num_experts:
            return (False,) * self.num_layers
        return tuple(
            layer not in text.mlp_only_layers and (layer + 1) % text.decoder_sparse_step == 0
            for layer in range(self.num_layers)
        )

    @property
    def rope_theta(self) -> float:
        return self.hf.text_config.rope_parameters["rope_theta"]

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Frequencies of time, height, width; together half a head."""
        time, height, width = self.hf.text_config.rope_parameters["mrope_section"]
        return time, height, width

    @property
    def deepstack_layers(self) -> tuple[int, ...]:
        """Layers of the vision tower whose features the first language layers add (n-th feature: after layer n)."""
        return tuple(self.hf.vision_config.to_dict().get("deepstack_visual_indexes", ()))


def read_architecture(hf_dir: str) -> Architecture:
    """Reads `hf_dir`/config.json, which `config.check_model` has found.

    Raises:
        ValueError: a model class that is not supported, or a setting of it that is not.
    """
    path = Path(hf_dir) / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    name = (tree.get("architectures") or ["unnamed"])[0]
    if name not in FAMILIES:
        raise ValueError(f"{path}: architecture {name} is not supported. Supported: {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    try:
        hf = family.config_class.from_pretrained(hf_dir)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {error}") from error
    architecture = Architecture(hf=hf, family=family)
    complaints = unsupported_settings(architecture, tree)
    if complaints:
        raise ValueError(f"{path}: the policy would not compute what this model computes: {'; '.join(complaints)}.")
    return architecture


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
        "qk_layernorm": architecture.qk_norm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.hf.text_config.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    moe_layers = architecture.moe_layers
    if any(moe_layers):
        fields |= {
            "num_moe_experts": architecture.num_experts,
            "moe_ffn_hidden_size": architecture.expert_ffn_size,
            "moe_layer_freq": 1 if all(moe_layers) else [int(is_moe) for is_moe in moe_layers],
            "moe_router_topk": architecture.hf.text_config.num_experts_per_tok,
            # transformers: softmax over all experts, then the chosen ones divided by their sum; that is the softmax
            # over the chosen ones
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "softmax",
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    return fields
