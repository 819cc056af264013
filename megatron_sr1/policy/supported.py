"""Which settings of a supported model class the policy computes as transformers does; the rest is refused by name."""

from __future__ import annotations

from typing import Any

from megatron_sr1.policy.architecture import Architecture

Rule = tuple[str, Any, bool, str]  # key, value, is it supported, what would be


def unsupported_settings(architecture: Architecture) -> list[str]:
    """One phrase for each setting that is not supported: key, value, what is."""
    rules = [*_text_rules(architecture), *_rotary_rules(architecture), *_expert_rules(architecture)]
    return [f"{key}={value!r} is not supported, it must be {rule}" for key, value, good, rule in rules if not good]


def _text_rules(architecture: Architecture) -> list[Rule]:
    text, hidden = architecture.hf.text_config, architecture.hidden_size
    fields = text.to_dict()  # not every class has every field
    window, bias = fields.get("sliding_window"), fields.get("attention_bias")
    head_dim, whole = architecture.head_dim, architecture.head_dim * architecture.num_heads == hidden
    levels, visual = len(architecture.deepstack_layers), architecture.hf.vision_config.out_hidden_size
    return [
        ("hidden_act", text.hidden_act, text.hidden_act == "silu", "silu"),
        ("attention_dropout", text.attention_dropout, not text.attention_dropout, "0"),
        ("sliding_window", window, window is None, "null, or use_sliding_window false"),
        ("attention_bias", bias, architecture.family.qkv_bias or not bias, "false"),
        ("head_dim", head_dim, architecture.family.own_head_dim or whole, "hidden_size / num_attention_heads"),
        ("deepstack_visual_indexes", levels, levels <= architecture.num_layers, "at most one for each language layer"),
        ("vision_config.out_hidden_size", visual, visual == hidden, f"hidden_size={hidden}"),
    ]


def _rotary_rules(architecture: Architecture) -> list[Rule]:
    rope, half = architecture.hf.text_config.rope_parameters, architecture.head_dim // 2
    section, interleaved = list(architecture.mrope_section), architecture.mrope_interleaved
    wanted = architecture.family.interleaved_rotary  # transformers does not read the flag
    part, halves = rope.get("partial_rotary_factor", 1.0), f"three numbers that add up to head_dim / 2 = {half}"
    return [
        ("rope_parameters.rope_type", rope["rope_type"], rope["rope_type"] == "default", "default or mrope"),
        ("rope_parameters.partial_rotary_factor", part, part == 1.0, "1"),
        ("rope_parameters.mrope_section", section, sum(section) == half, halves),
        ("rope_parameters.mrope_interleaved", interleaved, interleaved in (None, wanted), str(wanted).lower()),
    ]


def _expert_rules(architecture: Architecture) -> list[Rule]:
    if not architecture.family.has_experts:
        return []
    experts, chosen = architecture.num_experts, architecture.experts_per_token
    dense = architecture.hf.text_config.mlp_only_layers
    normed = architecture.norm_topk_prob  # transformers always normalises
    return [
        ("num_experts", experts, experts > 1, "2 or more"),
        ("num_experts_per_tok", chosen, 2 <= chosen <= experts, f"between 2 and num_experts={experts}"),
        ("norm_topk_prob", normed, normed is not False, "true"),
        ("mlp_only_layers", dense, any(architecture.moe_layers), "such that some layer has experts"),
    ]
