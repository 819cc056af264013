"""The supported model families: what their models have in common beyond their config.json. No torch, no transformers.

A new family starts here, and in `policy/read.py` for its classes of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_sr1.config.rules import ConfigError


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
    window_has_switch: bool  # sliding_window counts only where use_sliding_window is true
    tied_in_text: bool  # tie_word_embeddings may stand in text_config only
    # numbers that transformers takes for absent keys, from the family's configuration classes
    defaults: Mapping[str, float] = field(hash=False)
    deepstack_layers: tuple[int, ...] = ()  # likewise, of the vision tower
    has_experts: bool = False  # feed-forward parts may be mixtures of experts

    def tensor_name(self, stored: str) -> str:
        """A tensor's name as published. transformers 4.52 and later may have stored it under its place in the tree of
        modules."""
        for place, published in (
            ("model.language_model.", self.language_prefix),
            ("model.visual.", self.vision_prefix),
        ):
            if stored.startswith(place):
                return published + stored.removeprefix(place)
        return stored


@dataclass(frozen=True)
class HfConfig:
    """A model as its config.json describes it."""

    path: Path  # of the file
    class_name: str  # of transformers and vLLM, a key of FAMILIES
    family: Family
    repository: str | None  # of Hugging Face, where the file says whose model it is
    num_layers: int
    hidden_size: int
    ffn_size: int  # width of a dense layer's feed-forward part
    num_heads: int
    num_kv_heads: int
    head_dim: int  # channels; heads together need not be as wide as the hidden state (Qwen3-VL-4B, 32B, 30B-A3B)
    vocab_size: int
    tied: bool  # the head is the transposed embedding
    num_experts: int  # 0 for a dense model
    experts_per_token: int  # 0 for a dense model
    expert_ffn_size: int  # width of one expert; 0 for a dense model
    moe_layers: tuple[bool, ...]  # [num_layers]: is the feed-forward part a mixture of experts
    norm_topk_prob: bool | None  # the weights of a token's experts add up to 1; None: not written
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies of time, height, width; together half a head
    mrope_interleaved: bool | None  # None: not written; transformers goes by the family
    deepstack_layers: tuple[int, ...]  # of the vision tower: the n-th one's features are added after language layer n
    visual_token_side: int  # pixels: a visual token is a square of merged patches
    unsupported: tuple[str, ...] = field(default=(), compare=False)  # settings the policy computes otherwise

    def check_supported(self) -> None:
        """
        Raises:
            ConfigError: a setting is not supported; the message names each, with what would be.
        """
        if self.unsupported:
            complaints = "; ".join(self.unsupported)
            raise ConfigError(f"{self.path}: the policy would not compute what this model computes: {complaints}.")


_QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    language_prefix="model.",
    vision_prefix="visual.",
    qk_norm=False,
    qkv_bias=True,
    own_head_dim=False,
    interleaved_rotary=False,
    keys_at_top=True,
    window_has_switch=True,
    tied_in_text=True,
    defaults={
        "hidden_size": 8192,
        "vocab_size": 152064,
        "rope_theta": 1_000_000.0,
        "out_hidden_size": 3584,
        "patch_size": 14,
    },
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
    window_has_switch=False,
    tied_in_text=False,
    defaults={
        "hidden_size": 4096,
        "vocab_size": 151936,
        "rope_theta": 500_000.0,
        "head_dim": 128,
        "out_hidden_size": 3584,
        "patch_size": 16,
    },
    deepstack_layers=(8, 16, 24),
)
_QWEN3_VL_MOE = replace(
    _QWEN3_VL,
    name="qwen3_vl_moe",
    defaults={
        "hidden_size": 2048,
        "vocab_size": 151936,
        "rope_theta": 500_000.0,
        "out_hidden_size": 3584,
        "patch_size": 16,
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
