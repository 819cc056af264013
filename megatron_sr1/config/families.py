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
    experts_turned: bool = (
        True  # published checkpoints have experts [in, out]; else [out, in], as transformers saves all
    )
    has_shared_expert: bool = False  # every layer is a mixture, beside an expert of every token, which has a gate
    has_linear_layers: bool = False  # some layers have a recurrent state, by a gated delta rule, in place of attention
    output_gate: bool = False  # what attention has found is multiplied by the sigmoid of a gate, an output of q_proj
    zero_centred_norms: bool = False  # RMSNorm multiplies by 1 + weight
    part_rotary: float = 1.0  # of a head's channels, those that are turned, where config.json does not say
    # of tensors that checkpoints may hold and that no part of the policy is: converted and exported as they are
    kept_prefixes: tuple[str, ...] = ()

    def is_kept(self, name: str) -> bool:
        """Whether a tensor goes through conversion and export as it is."""
        return name.startswith(self.kept_prefixes) if self.kept_prefixes else False

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
class LinearAttention:
    """The sizes of a layer with a gated delta rule (Gated Delta Networks, arXiv 2412.06464)."""

    num_key_heads: int  # and of queries
    num_value_heads: int  # a multiple: each key head serves the same number of them, side by side
    key_dim: int  # channels of a head
    value_dim: int
    taps: int  # of the convolution over queries, keys and values, the token itself among them

    @property
    def values_per_key(self) -> int:
        return self.num_value_heads // self.num_key_heads

    @property
    def channels_per_key(self) -> int:
        """Channels that the convolution sees for each key head: its query, its key, its values."""
        return 2 * self.key_dim + self.values_per_key * self.value_dim

    @property
    def rows_per_key(self) -> int:
        """Outputs of the first product for each key head: query, key, values, output gates, learning rates, decays."""
        return self.channels_per_key + self.values_per_key * (self.value_dim + 2)


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
    shared_expert_size: int  # width of the expert of every token; 0 where there is none
    moe_layers: tuple[bool, ...]  # [num_layers]: is the feed-forward part a mixture of experts
    norm_topk_prob: bool | None  # the weights of a token's experts add up to 1; None: not written
    rope_theta: float
    rotary_dim: int  # channels of a head that are turned, the first ones
    mrope_section: tuple[int, int, int]  # frequencies of time, height, width; together half of rotary_dim
    mrope_interleaved: bool | None  # None: not written; transformers goes by the family
    linear: LinearAttention | None  # None: no layer has it
    linear_layers: tuple[bool, ...]  # [num_layers]: has it a gated delta rule in place of attention
    deepstack_layers: tuple[int, ...]  # of the vision tower: the n-th one's features are added after language layer n
    visual_token_side: int  # pixels: a visual token is a square of merged patches
    unsupported: tuple[str, ...] = field(default=(), compare=False)  # settings the policy computes otherwise

    @property
    def num_attention_layers(self) -> int:
        """Those whose tokens attend to each other."""
        return self.num_layers - sum(self.linear_layers)

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
_QWEN3_5 = replace(
    _QWEN3_VL,
    name="qwen3_5",
    defaults={
        "hidden_size": 4096,
        "vocab_size": 248320,
        "rope_theta": 10_000.0,
        "head_dim": 256,
        "out_hidden_size": 3584,
        "patch_size": 16,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
    },
    deepstack_layers=(),
    has_linear_layers=True,
    output_gate=True,
    zero_centred_norms=True,
    part_rotary=0.25,
    kept_prefixes=("mtp.",),  # the heads that predict further tokens
)
_QWEN3_5_MOE = replace(
    _QWEN3_5,
    name="qwen3_5_moe",
    defaults={
        **_QWEN3_5.defaults,
        "hidden_size": 2048,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    has_experts=True,
    experts_turned=False,
    has_shared_expert=True,
)
FAMILIES: dict[str, Family] = {
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_5_VL,
    "Qwen3VLForConditionalGeneration": _QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3_VL_MOE,
    "Qwen3_5ForConditionalGeneration": _QWEN3_5,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5_MOE,
}
