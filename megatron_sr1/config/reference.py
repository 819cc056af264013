"""`objective.reference_dir`: the weights that training began with, where something is read by them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_sr1.config.families import HfConfig
from megatron_sr1.config.hf_config import read_hf_config
from megatron_sr1.config.json_section import read_json
from megatron_sr1.config.rules import require
from megatron_sr1.config.whole import Config

_MAY_DIFFER = ("path", "repository", "norm_topk_prob", "mrope_interleaved", "unsupported")


def check_reference(config: Config, readers: Collection[str]) -> None:
    """
    Args:
        readers: who reads the passes that follow the first (`LaterPass.reader`).

    Raises:
        ConfigError: the engines, which have the shape of model.hf_dir, could not take its weights.
    """
    folder, own = config.objective.reference_dir, config.model.hf_dir
    if not folder or "reference" not in (*config.evaluate.controls, *readers):
        return
    key, remedy = "objective.reference_dir", "Give the folder of the weights that training began with."
    there = (Path(folder) / "config.json").is_file()
    require(there, key, folder, "a model directory in Hugging Face format, which holds a config.json", remedy)
    model, start = _shape(read_hf_config(own)), _shape(read_hf_config(folder))
    for name in sorted(model.keys() & start.keys()):
        wanted, found = model[name], start[name]
        allowed = f"a model such as model.hf_dir={own!r}, where {name} is {wanted!r}, and not {found!r}"
        require(wanted == found, key, folder, allowed, remedy)


def _shape(model: HfConfig) -> dict[str, Any]:
    """What decides the tensors, and what is computed with them; of the vision tower what its file says."""
    vision = read_json(model.path).section("vision_config")
    tower = {vision.prefix + key: value for key, value in vision.values.items() if isinstance(value, int)}
    return {each.name: getattr(model, each.name) for each in fields(model) if each.name not in _MAY_DIFFER} | tower
