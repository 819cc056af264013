"""A model of a published shape with random weights: its config.json with fewer layers, a small tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SIDE_PATCHES = 2  # of one visual token
MAX_VISUAL_TOKENS = 64  # of an image


def with_layers(tree: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json's tree with the first `num_layers` language layers; every width stays."""
    whole = json.loads(json.dumps(tree))
    text = whole.get("text_config", whole)
    text["num_hidden_layers"] = num_layers
    if "max_window_layers" in text:
        text["max_window_layers"] = num_layers
    return whole


def num_layers(tree: Mapping[str, Any]) -> int:
    """Of the language model."""
    return tree.get("text_config", tree)["num_hidden_layers"]


def write_config(folder: Path, tree: Mapping[str, Any]) -> Path:
    """A folder with a config.json alone, enough to plan with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree, indent=1))
    return folder


def write_random_model(out: Path, tree: Mapping[str, Any], texts: Sequence[str], device: str) -> Path:
    """Config, random bf16 weights made on `device`, tokenizer trained on `texts` and processor, as a model folder."""
    from megatron_sr1.digits.tiny_model import create_tiny_model
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

    define_missing_torchvision_ops()
    import transformers

    create_tiny_model(out, texts, seed=0)  # tokenizer and processor are kept
    tiny = json.loads((out / "config.json").read_text())
    generation = transformers.GenerationConfig.from_pretrained(out)
    (out / "model.safetensors").unlink()
    write_config(out, _with_ids(tree, tiny))
    _set_patch_size(out, tree["vision_config"]["patch_size"])
    config = transformers.AutoConfig.from_pretrained(out)
    model_class = getattr(transformers, tree["architectures"][0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config = generation
    model.save_pretrained(out)
    for path in out.glob("*.safetensors"):
        _publish_experts(path)
    return out


def _publish_experts(path: Path) -> None:
    """Turns the experts as published checkpoints, and engines, have them: gate_up [E, H, 2I] and down [E, I, H], where
    transformers saves each transposed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    experts = [name for name in tensors if ".mlp.experts." in name]
    if experts:
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
        save_file(tensors, path, metadata={"format": "pt"})


def _with_ids(tree: Mapping[str, Any], tiny: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens are those of the small tokenizer, wherever the tree names them."""
    whole = json.loads(json.dumps(tree))
    ids = {**tiny["text_config"], **tiny}
    for part in (whole, whole.get("text_config", {})):
        part.update({key: ids[key] for key in part if key.endswith("_token_id") and ids.get(key) is not None})
    return whole


def _set_patch_size(out: Path, patch_size: int) -> None:
    pixels = (SIDE_PATCHES * patch_size) ** 2
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        fields = json.loads((out / name).read_text())
        fields |= {"patch_size": patch_size, "min_pixels": pixels, "max_pixels": MAX_VISUAL_TOKENS * pixels}
        (out / name).write_text(json.dumps(fields, indent=2) + "\n")
