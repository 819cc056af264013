"""From a Hugging Face config.json to what the policy needs to know about a model: our reading, held against
transformers' own; and the weights beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from megatron_sr1.config import Family, read_hf_config
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.vision import new_tower
from megatron_sr1.weights import HfTensors, check_tensors

_CLASSES: dict[str, type[PreTrainedConfig]] = {  # by the name of a family
    "qwen2_5_vl": Qwen2_5_VLConfig,
    "qwen3_vl": Qwen3VLConfig,
    "qwen3_vl_moe": Qwen3VLMoeConfig,
    "qwen3_5": Qwen3_5Config,
    "qwen3_5_moe": Qwen3_5MoeConfig,
}


def read_architecture(hf_dir: str) -> Architecture:
    """Reads `hf_dir`/config.json.

    Raises:
        ConfigError: what `read_hf_config` refuses.
        ValueError: a key that transformers refuses, or reads as something else.
    """
    config = read_hf_config(hf_dir)
    config.check_supported()
    path = Path(hf_dir) / "config.json"
    try:
        hf = _CLASSES[config.family.name].from_pretrained(hf_dir)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {error}") from error
    architecture = Architecture(**vars(config), hf=hf)
    for key, (ours, theirs) in _two_readings(architecture).items():
        if ours != theirs:
            raise ValueError(
                f"{path}: {key} is read as {ours!r} here and as {theirs!r} by transformers, whose model would be "
                "another one. Correct the file, or use the version of transformers that this project asks for."
            )
    return architecture


def open_tensors(architecture: Architecture) -> HfTensors:
    """The tensors of the model's folder, which are exactly those of the model; headers are read.

    Raises:
        ValueError: see `HfTensors` and `check_tensors`.
    """
    tensors = HfTensors(architecture.path.parent, architecture.family)
    check_tensors(tensors, architecture, vision_names(architecture))
    return tensors


def vision_names(architecture: Architecture) -> list[str]:
    """Of the vision tower's parameters, as its module has them; no memory is taken for them."""
    with torch.device("meta"):
        tower = new_tower(architecture.hf.vision_config)
    return [name for name, _ in tower.named_parameters()]


def _two_readings(model: Architecture) -> dict[str, tuple[Any, Any]]:
    """By key of config.json: what `read_hf_config` found, and what transformers found."""
    text, rope, vision = model.hf.text_config, model.hf.text_config.rope_parameters, model.hf.vision_config
    # the classes differ in their fields
    head_dim = text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads
    found = {
        "num_hidden_layers": (model.num_layers, text.num_hidden_layers),
        "hidden_size": (model.hidden_size, text.hidden_size),
        "intermediate_size": (model.ffn_size, _ffn_size(text)),
        "num_attention_heads": (model.num_heads, text.num_attention_heads),
        "num_key_value_heads": (model.num_kv_heads, text.num_key_value_heads),
        "head_dim": (model.head_dim, head_dim),
        "vocab_size": (model.vocab_size, text.vocab_size),
        "tie_word_embeddings": (model.tied, model.hf.tie_word_embeddings),
        "rope_theta": (model.rope_theta, rope["rope_theta"]),
        "mrope_section": (model.mrope_section, tuple(rope.get("mrope_section") or ())),
        "hidden_act": ("silu", text.hidden_act),
        "rope_type": ("default", rope["rope_type"]),
        "attention_dropout": (0.0, float(text.attention_dropout)),
        "sliding_window": (None, text.to_dict().get("sliding_window")),
        "vision_config.out_hidden_size": (model.hidden_size, vision.out_hidden_size),
        "deepstack_visual_indexes": (
            model.deepstack_layers,
            tuple(vision.to_dict().get("deepstack_visual_indexes", ())),
        ),
    }
    if model.linear is not None:
        linear = [text.linear_num_key_heads, text.linear_num_value_heads]
        linear += [text.linear_key_head_dim, text.linear_value_head_dim, text.linear_conv_kernel_dim]
        layers = tuple(layer == "linear_attention" for layer in text.layer_types)
        found |= {
            "linear_*": (list(vars(model.linear).values()), linear),
            "layer_types": (model.linear_layers, layers),
            "partial_rotary_factor": (model.rotary_dim, int(head_dim * rope["partial_rotary_factor"])),
        }
    if model.family.has_experts:
        found |= {
            "num_experts": (model.num_experts, text.num_experts),
            "num_experts_per_tok": (model.experts_per_token, text.num_experts_per_tok),
            "moe_intermediate_size": (model.expert_ffn_size, text.moe_intermediate_size),
            "mlp_only_layers, decoder_sparse_step": (model.moe_layers, tuple(_moe_layers(text, model.family))),
        }
    return found


def _ffn_size(text: Any) -> int:
    sizes = text.to_dict()
    return sizes.get("shared_expert_intermediate_size") or sizes["intermediate_size"]


def _moe_layers(text: Any, family: Family) -> Iterator[bool]:
    """As transformers' Qwen3VLMoeTextDecoderLayer decides it; Qwen3_5MoeDecoderLayer has no choice."""
    for layer in range(text.num_hidden_layers):
        sparse = family.has_shared_expert or (layer + 1) % text.decoder_sparse_step == 0
        yield sparse and (family.has_shared_expert or layer not in text.mlp_only_layers)
