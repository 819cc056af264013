"""The supported model families: what their models have in common beyond their config.json. No torch, no transformers.

A new family starts here, and in `policy/read.py` for its classes of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    """What the models of one Hugging Face class have in common."""

    name: str
    language_prefix: str  # of tensor names in a checkpoint, as published and as transformers saves them
    vision_prefix: str
    qk_norm: bool  # RMSNorm of each head's query and key, before the rotary embedding
    qkv_bias: bool
    own_head_dim: bool  # config.json may set head_dim; else it is hidden_size / num_attention_heads
    interleaved_rotary: bool  # mRoPE: time, height, width by turns along the frequencies; else in three sections
    keys_at_top: bool  # older checkpoints have no text_config and keep the language model's keys at the top
    tied_in_text: bool  # tie_word_embeddings may stand in text_config only
    # numbers that transformers takes for absent keys, from the family's configuration classes
    defaults: Mapping[str, float] = field(hash=False)
    deepstack_layers: tuple[int, ...] = ()  # likewise, of the vision tower
    has_experts: bool = False  # feed-forward parts may be mixtures of experts


_QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    language_prefix="model.",
    vision_prefix="visual.",
    qk_norm=False,
    qkv_bias=True,
    own_head_dim=False,
    interleaved_rotary=False,
    keys_at_top=True,
    tied_in_text=True,
    defaults={"hidden_size": 8192, "vocab_size": 152064, "rope_theta": 1_000_000.0},
)
_QWEN3_VL = Family(
    name="qwen3_vl",
    language_prefix="model.language_model.",
    vision_prefix="model.visual.",
    qk_norm=True,
    qkv_bias=False,
    own_head_dim=True,
    interleaved_rotary=True,
    keys_at_top=False,
    tied_in_text=False,
    defaults={"hidden_size": 4096, "vocab_size": 151936, "rope_theta": 500_000.0, "head_dim": 128},
    deepstack_layers=(8, 16, 24),
)
_QWEN3_VL_MOE = replace(
    _QWEN3_VL,
    name="qwen3_vl_moe",
    defaults={
        "hidden_size": 2048,
        "vocab_size": 151936,
        "rope_theta": 500_000.0,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "decoder_sparse_step": 1,
    },
    has_experts=True,
)
FAMILIES: dict[str, Family] = {
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_5_VL,
    "Qwen3VLForConditionalGeneration": _QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3_VL_MOE,
}
