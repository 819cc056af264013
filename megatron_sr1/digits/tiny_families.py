"""Small random models of every supported family, in Hugging Face format: config, weights, tokenizer, processor.

Those of the tests have nothing at a value that hides a mistake: norm weights are not 1, biases not 0, heads are not
hidden_size / num_heads wide where the family allows that, experts are far from a tie. Plain ones begin as transformers
makes them, for whoever wants to train one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.digits.tiny_model import (
    MAX_POSITION,
    ROPE_THETA,
    VISION_PREPROCESSOR,
    VOCAB_MULTIPLE,
    create_tiny_model,
    qwen_tokenizer,
    train_tokenizer,
)

TEXTS = ("What is the sum of all digits?", "Describe the picture, then answer: is 7 larger than 3?")
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,
}
_QWEN3_TEXT = _TEXT | {
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
_PROJECTIONS = ("gate", "up", "down")
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "intermediate_size": 48,
    "initializer_range": 0.08,
}
_QWEN3_VISION = _VISION | {
    "patch_size": 16,
    "num_position_embeddings": 16,  # a 4 x 4 grid, stretched over every image
    "deepstack_visual_indexes": [0, 2],
}


_QWEN3_5_TEXT = _TEXT | {
    "head_dim": 32,
    "full_attention_interval": 2,  # the other layers have a gated delta rule
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    },
}
_QWEN3_5_VISION = {key: value for key, value in _QWEN3_VISION.items() if key != "deepstack_visual_indexes"}


@dataclass(frozen=True)
class ZooFamily:
    """How to make a model of a family."""

    class_name: str  # in transformers, and in config.json
    config_name: str
    tied: bool
    text: Mapping[str, Any]
    vision: Mapping[str, Any]


_QWEN2_5 = {
    "text": _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 3, 3]}},
    "vision": _VISION | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
}
ZOO = {
    "qwen2_5_vl_tied": ZooFamily("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", True, **_QWEN2_5),
    "qwen2_5_vl_untied": ZooFamily("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", False, **_QWEN2_5),
    "qwen3_vl": ZooFamily("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", True, _QWEN3_TEXT, _QWEN3_VISION),
    "qwen3_vl_moe": ZooFamily(
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", False, _QWEN3_TEXT | _EXPERTS, _QWEN3_VISION
    ),
    "qwen3_5_tied": ZooFamily("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", True, _QWEN3_5_TEXT, _QWEN3_5_VISION),
    "qwen3_5_moe": ZooFamily(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        False,
        _QWEN3_5_TEXT | _EXPERTS | {"shared_expert_intermediate_size": 40},
        _QWEN3_5_VISION,
    ),
    "qwen3_5": ZooFamily("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", False, _QWEN3_5_TEXT, _QWEN3_5_VISION),
}


# beyond ZOO's: an engine on a CPU takes new weights of experts whose width is a multiple of 32
_ENGINE: dict[str, dict[str, int]] = {
    "qwen3_vl": {},
    "qwen3_vl_moe": {"moe_intermediate_size": 96},  # neither the model's width nor its half
    "qwen3_5": {},
    "qwen3_5_moe": {"moe_intermediate_size": 64},
}


def create_plain(folder: Path, family: str, texts: Iterable[str], seed: int = 0) -> None:
    """Writes a small model of a family of `config.families`, of random weights. The same seed writes the same bytes.

    Args:
        folder: one that is not there, or is empty; it is there when the model is whole.
        texts: what the tokenizer is trained on.

    Raises:
        ValueError: there is something at `folder`.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise ValueError(f"--out {folder} is there already, and nothing is written over it. Give another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / "model"
        if family == "qwen2_5_vl":
            create_tiny_model(made, texts, seed)
        else:
            create_family(made, family, seed=seed, texts=texts, plain=True, **_ENGINE[family])
        os.replace(made, folder)


def create_family(
    folder: Path, family: str, *, seed: int = 0, texts: Iterable[str] = TEXTS, plain: bool = False, **overrides: Any
) -> Path:
    """Writes a model of ZOO's `family` into `folder` and returns it. `tied` and keys of the text config override.

    transformers saves the experts its own way; `tests.model_zoo` has how published checkpoints hold them.

    Args:
        plain: the weights stay as transformers makes them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer(train_tokenizer(texts))
    tokenizer.save_pretrained(folder)
    entry = ZOO[family]
    processors = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    side = entry.vision["patch_size"] * entry.vision["spatial_merge_size"]
    pixels = {"patch_size": entry.vision["patch_size"], "min_pixels": side**2, "max_pixels": 64 * side**2}
    for name, kind in processors.items():
        (folder / name).write_text(json.dumps(kind | VISION_PREPROCESSOR | pixels, indent=2) + "\n")
    _save_weights(folder, entry, tokenizer.get_vocab(), seed, overrides, plain=plain)
    return folder


def _save_weights(
    folder: Path, entry: ZooFamily, ids: Mapping[str, int], seed: int, overrides: Mapping[str, Any], *, plain: bool
) -> None:
    import torch
    import transformers

    text = dict(entry.text) | {"vocab_size": (len(ids) // VOCAB_MULTIPLE + 1) * VOCAB_MULTIPLE}
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]} if plain else {}
    text |= {key: value for key, value in overrides.items() if key != "tied"}
    config = getattr(transformers, entry.config_name)(
        text_config=text,
        vision_config=dict(entry.vision),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=overrides.get("tied", entry.tied),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, entry.class_name)(config).float()
        for name, parameter in () if plain else model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.3)
            elif name.endswith("A_log"):
                parameter.uniform_(-4.0, -1.0)  # slow enough that a state outlives a chunk
            elif "norm" in name and name.endswith("weight"):
                # some families multiply by 1 + weight
                centre = 0.0 if entry.class_name.startswith("Qwen3_5") and ".visual." not in name else 1.0
                parameter.normal_(1.0 if name.endswith("linear_attn.norm.weight") else centre, 0.3)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.2)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    if entry.class_name == "Qwen3_5MoeForConditionalGeneration":
        _join_experts(folder / "model.safetensors")


def _join_experts(path: Path) -> None:
    """transformers saves Qwen3.5's experts one by one, and loads them so or as published: a tensor of a layer's."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name in sorted(name for name in tensors if ".mlp.experts.0.gate_proj." in name):
        start = name.removesuffix("0.gate_proj.weight")
        number = sum(1 for other in tensors if other.startswith(start)) // 3
        gates, ups, downs = (
            [tensors.pop(f"{start}{expert}.{part}_proj.weight") for expert in range(number)] for part in _PROJECTIONS
        )
        tensors[f"{start}gate_up_proj"] = torch.cat([torch.stack(gates), torch.stack(ups)], dim=1)
        tensors[f"{start}down_proj"] = torch.stack(downs)
    save_file(tensors, path, metadata={"format": "pt"})
