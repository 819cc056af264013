"""Which settings of a supported model class the policy computes as transformers does; the rest is refused by name.

Whatever a config.json asks for that the policy does not compute the same way must stop here, and is never ignored. An
absent key means what transformers takes it for.
"""

from __future__ import annotations

from typing import Any

from megatron_sr1.config.families import HfConfig
from megatron_sr1.config.json_section import JsonSection

Rule = tuple[str, Any, bool, str]  # key, value, is it supported, what would be


def unsupported_settings(model: HfConfig, tree: JsonSection, text: JsonSection) -> list[str]:
    """One phrase for each setting that is not supported: key, value, what is.

    Args:
        model: the numbers of the file.
        tree: all of it.
        text: the language model's part.
    """
    rules = [
        *_quantisation_rules(tree, text),
        *_text_rules(model, tree, text),
        *_rotary_rules(model, text),
        *_linear_rules(model, text),
        *_expert_rules(model, text),
    ]
    return [f"{key}={value!r} is not supported, it must be {rule}" for key, value, good, rule in rules if not good]


def rope_section(text: JsonSection) -> JsonSection:
    """The rotary keys, under the name that older checkpoints give them or the present one."""
    return text.section("rope_scaling" if text.values.get("rope_scaling") else "rope_parameters")


def _quantisation_rules(tree: JsonSection, text: JsonSection) -> list[Rule]:
    found = {
        key: section.section(key).values.get("quant_method", "unnamed")
        for section in (tree, text)
        for key in ("quantization_config", "compression_config")
        if not section.is_null(key)
    }
    return [
        (f"{key}.quant_method", method, False, "absent: take the model in bfloat16") for key, method in found.items()
    ]


def _text_rules(model: HfConfig, tree: JsonSection, text: JsonSection) -> list[Rule]:
    act, dropout = text.values.get("hidden_act", "silu"), text.values.get("attention_dropout", 0.0)
    has_window = text.values.get("use_sliding_window", not model.family.window_has_switch)
    window, bias = text.values.get("sliding_window") if has_window else None, text.values.get("attention_bias")
    whole, levels = model.head_dim * model.num_heads == model.hidden_size, len(model.deepstack_layers)
    visual = tree.section("vision_config").values.get("out_hidden_size", model.family.defaults["out_hidden_size"])
    return [
        ("hidden_act", act, act == "silu", "silu"),
        ("attention_dropout", dropout, not dropout, "0"),
        ("sliding_window", window, window is None, "null, or use_sliding_window false"),
        ("attention_bias", bias, model.family.qkv_bias or not bias, "false"),
        ("head_dim", model.head_dim, model.family.own_head_dim or whole, "hidden_size / num_attention_heads"),
        ("deepstack_visual_indexes", levels, levels <= model.num_layers, "at most one for each language layer"),
        ("vision_config.out_hidden_size", visual, visual == model.hidden_size, f"hidden_size={model.hidden_size}"),
    ]


def _rotary_rules(model: HfConfig, text: JsonSection) -> list[Rule]:
    rope, half, wanted = rope_section(text).values, model.rotary_dim // 2, model.family.interleaved_rotary
    section, interleaved = list(model.mrope_section), model.mrope_interleaved  # transformers does not read the flag
    kind, part = rope.get("rope_type", rope.get("type", "default")), rope.get("partial_rotary_factor", 1.0)
    takes_part, turned = model.family.part_rotary < 1, model.rotary_dim
    halves = f"three numbers that add up to half of the turned channels, {half}"
    return [
        ("rope_parameters.rope_type", kind, kind in ("default", "mrope"), "default or mrope"),
        ("rope_parameters.partial_rotary_factor", part, takes_part or part == 1.0, "1"),
        (
            "head_dim * partial_rotary_factor",
            turned,
            turned % 2 == 0 and 0 < turned <= model.head_dim,
            f"an even number from 2 to head_dim={model.head_dim}",
        ),
        ("rope_parameters.mrope_section", section, sum(section) == half, halves),
        ("rope_parameters.mrope_interleaved", interleaved, interleaved in (None, wanted), str(wanted).lower()),
    ]


def _linear_rules(model: HfConfig, text: JsonSection) -> list[Rule]:
    linear = model.linear
    if linear is None:
        return []
    keys, values = linear.num_key_heads, linear.num_value_heads
    kind = text.values.get("output_gate_type", "silu")
    gate, scale = text.values.get("attn_output_gate", True), text.values.get("layer_scale", False)
    layers = text.values.get("layer_types")
    return [
        ("layer_types", layers, model.num_attention_layers > 0, "such that some layer is full_attention"),
        ("linear_num_value_heads", values, values % keys == 0, f"a multiple of linear_num_key_heads={keys}"),
        ("attn_output_gate", gate, gate is True, "true"),  # transformers does not read it, vLLM does
        ("layer_scale", scale, not scale, "false"),  # likewise
        ("output_gate_type", kind, kind in ("silu", "swish"), "silu or swish"),  # likewise
    ]


def _expert_rules(model: HfConfig, text: JsonSection) -> list[Rule]:
    if not model.family.has_experts:
        return []
    experts, chosen, dense = model.num_experts, model.experts_per_token, text.values.get("mlp_only_layers")
    return [
        ("num_experts", experts, experts > 1, "2 or more"),
        ("num_experts_per_tok", chosen, 2 <= chosen <= experts, f"between 2 and num_experts={experts}"),
        ("norm_topk_prob", model.norm_topk_prob, model.norm_topk_prob is not False, "true"),  # transformers always does
        ("mlp_only_layers", dense, any(model.moe_layers), "such that some layer has experts"),
        # transformers knows no other
        (
            "mlp_only_layers, decoder_sparse_step",
            model.moe_layers,
            all(model.moe_layers) or not model.family.has_shared_expert,
            "such that every layer has experts",
        ),
    ]
