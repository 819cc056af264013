"""The one reader of a model's config.json, without torch and without transformers.

Accepted as transformers accepts it: the language model's keys in text_config or, in older checkpoints of a family that
was published so, at the top; both names of the experts' number; rotary keys in rope_parameters, or in rope_scaling with
rope_theta beside it. An absent key means what transformers takes it for; those that decide the layout must be there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sr1.config.families import FAMILIES, Family, HfConfig, LinearAttention
from megatron_sr1.config.json_section import REMEDY, JsonSection, read_json
from megatron_sr1.config.rules import ConfigError, require
from megatron_sr1.config.supported import rope_section, unsupported_settings

SPATIAL_MERGE = 2  # patches along a side of a visual token, where vision_config does not say
_MAX_LAYERS = 10**4  # lists and modules are made of them
_VISION_COUNTS = (
    *("hidden_size", "intermediate_size", "num_heads", "in_channels", "in_chans", "patch_size", "spatial_merge_size"),
    *("temporal_patch_size", "window_size", "num_position_embeddings"),
)
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu")  # of vision towers
_LINEAR, _FULL = "linear_attention", "full_attention"  # of layer_types
_DTYPES = ("auto", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def read_hf_config(hf_dir: str) -> HfConfig:
    """Reads `hf_dir`/config.json.

    Raises:
        ConfigError: no such file, no JSON object, an unsupported class, or a key that is missing or has a wrong value.
    """
    path = Path(hf_dir) / "config.json"
    require(
        bool(hf_dir) and path.is_file(),
        "model.hf_dir",
        hf_dir,
        "a model directory in Hugging Face format, which holds a config.json",
        "Give the path of one; `make quickstart` makes a tiny one.",
    )
    tree = read_json(path)
    class_name = _class_name(tree)
    family = FAMILIES[class_name]
    is_old = family.keys_at_top and tree.is_null("text_config")
    tree.check(is_old or not tree.is_null("text_config"), "text_config", "a JSON object")
    text = tree if is_old else tree.section("text_config")
    vision = tree.section("vision_config")
    _check_vision(vision)
    for part in (tree, text):
        _check_dtype(part)
    tied = tree.flag("tie_word_embeddings") or (family.tied_in_text and text.flag("tie_word_embeddings"))
    name = tree.values.get("_name_or_path")
    model = HfConfig(
        path=path,
        class_name=class_name,
        family=family,
        repository=name if _is_repository(name) else None,
        vocab_size=text.count("vocab_size", family.defaults["vocab_size"]),
        tied=bool(tied),
        deepstack_layers=vision.numbers("deepstack_visual_indexes", family.deepstack_layers),
        visual_token_side=vision.count("patch_size", family.defaults["patch_size"])
        * vision.count("spatial_merge_size", SPATIAL_MERGE),
        **(sizes := _layer_sizes(text, family)),
        **_experts(text, family),
        **_rotary(text, family, sizes["head_dim"]),
        **_linear(text, family),
    )
    return replace(model, unsupported=tuple(unsupported_settings(model, tree, text)))


def _class_name(tree: JsonSection) -> str:
    names = tree.values.get("architectures") or ["unnamed"]
    tree.check(isinstance(names, list) and isinstance(names[0], str), "architectures", "a list that names a class")
    if names[0] not in FAMILIES:
        raise ConfigError(
            f"{tree.path}: architecture {names[0]} is not supported. Supported: {', '.join(FAMILIES)}. "
            "Choose a model of one of these classes."
        )
    return names[0]


def _is_repository(name: Any) -> bool:
    """OWNER/MODEL; transformers also writes the folder that a model was loaded from."""
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/"))


def _layer_sizes(text: JsonSection, family: Family) -> dict[str, int]:
    heads, hidden = text.count("num_attention_heads"), text.count("hidden_size", family.defaults["hidden_size"])
    has_null = "num_key_value_heads" in text and text.is_null("num_key_value_heads")
    if "head_dim" in family.defaults or (family.own_head_dim and not text.is_null("head_dim")):
        head_dim = text.count("head_dim", family.defaults.get("head_dim"))
    elif text.prefix and not text.is_null("head_dim"):  # transformers ignores it among keys at the top
        head_dim = text.count("head_dim")
    else:
        head_dim = hidden // heads
    return {
        "num_layers": _num_layers(text),
        "hidden_size": hidden,
        # a model whose layers are all mixtures has no dense part but the shared expert
        "ffn_size": _shared_expert(text, family) or text.count("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": heads if has_null else text.count("num_key_value_heads"),
        "head_dim": head_dim,
    }


def _shared_expert(text: JsonSection, family: Family) -> int:
    key = "shared_expert_intermediate_size"
    return text.count(key, family.defaults[key]) if family.has_shared_expert else 0


def _num_layers(text: JsonSection) -> int:
    return text.count("num_hidden_layers", largest=_MAX_LAYERS)


def _check_vision(vision: JsonSection) -> None:
    """The numbers that transformers takes as they are; absent ones are its defaults."""
    for key in _VISION_COUNTS:
        if key in vision:
            vision.count(key)
    if "depth" in vision:
        vision.count("depth", largest=_MAX_LAYERS)
    vision.section("rope_parameters").number("rope_theta", 1e4)
    activation = vision.values.get("hidden_act", _ACTIVATIONS[0])
    vision.check(activation in _ACTIVATIONS, "hidden_act", f"one of {', '.join(_ACTIVATIONS)}")


def _check_dtype(part: JsonSection) -> None:
    """transformers looks the name up in torch, whatever it is."""
    for key in ("dtype", "torch_dtype"):
        value = part.values.get(key)
        part.check(value is None or value in _DTYPES, key, f"null or one of {', '.join(_DTYPES)}")


def _experts(text: JsonSection, family: Family) -> dict[str, Any]:
    layers = _num_layers(text)
    if not family.has_experts:
        none = dict.fromkeys(("num_experts", "experts_per_token", "expert_ffn_size", "shared_expert_size"), 0)
        return {**none, "moe_layers": (False,) * layers, "norm_topk_prob": None}
    # transformers lets the name that it writes win over the published one
    name = "num_local_experts" if "num_local_experts" in text else "num_experts"
    step = text.count("decoder_sparse_step", family.defaults.get("decoder_sparse_step", 1))
    dense = () if text.is_null("mlp_only_layers") else text.numbers("mlp_only_layers", ())
    return {
        "shared_expert_size": _shared_expert(text, family),
        "num_experts": text.count(name, family.defaults["num_experts"]),
        "experts_per_token": text.count("num_experts_per_tok", family.defaults["num_experts_per_tok"]),
        "expert_ffn_size": _expert_width(text, family),
        # as transformers' Qwen3VLMoeTextDecoderLayer decides it
        "moe_layers": tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        "norm_topk_prob": text.flag("norm_topk_prob", None),
    }


def _expert_width(text: JsonSection, family: Family) -> int:
    """Where a tensor of experts is square, nothing tells which way it lies: transformers takes it as it is, and vLLM
    always as published checkpoints have it. No file could be right for both."""
    width = text.count("moe_intermediate_size", family.defaults["moe_intermediate_size"])
    hidden = text.count("hidden_size", family.defaults["hidden_size"])
    square = family.experts_turned and hidden in (width, 2 * width)
    allowed = (
        "another number than hidden_size and its half: transformers and vLLM read square experts in different ways"
    )
    text.check(not square, "moe_intermediate_size", allowed)
    return width


def _linear(text: JsonSection, family: Family) -> dict[str, Any]:
    layers = _num_layers(text)
    if not family.has_linear_layers:
        return {"linear": None, "linear_layers": (False,) * layers}
    if text.is_null("layer_types"):  # as transformers' Qwen3_5TextConfig fills it
        every = text.count("full_attention_interval", family.defaults["full_attention_interval"])
        types = [_LINEAR if (layer + 1) % every else _FULL for layer in range(layers)]
    else:
        types = text.values["layer_types"]
        is_good = isinstance(types, list) and len(types) == layers and all(each in (_LINEAR, _FULL) for each in types)
        text.check(is_good, "layer_types", f"a list of num_hidden_layers={layers} names, each {_LINEAR} or {_FULL}")
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    sizes = [text.count(key, family.defaults[key]) for key in (f"linear_{name}" for name in names)]
    return {"linear": LinearAttention(*sizes), "linear_layers": tuple(each == _LINEAR for each in types)}


def _rotary(text: JsonSection, family: Family, head_dim: int) -> dict[str, Any]:
    rope = rope_section(text)
    theta = text.number("rope_theta", family.defaults["rope_theta"])
    section = rope.numbers("mrope_section", ())
    part = rope.number("partial_rotary_factor", text.number("partial_rotary_factor", family.part_rotary))
    part = part if family.part_rotary < 1 else 1.0  # the other families' are refused, see supported.py
    name, allowed = f"{rope.path}: {rope.prefix}mrope_section", "three numbers that add up to half of what is turned"
    require(len(section) == 3, name, list(section), allowed, REMEDY)
    return {
        "rope_theta": rope.number("rope_theta", theta),
        "rotary_dim": int(head_dim * part),
        "mrope_section": section,
        "mrope_interleaved": rope.flag("mrope_interleaved", None),
    }
