"""`objective.reference_dir`: the weights that training began with, where something is read by them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from megatron_sr1.config.hf_config import read_hf_config
from megatron_sr1.config.rules import require
from megatron_sr1.config.whole import Config

_MAY_DIFFER = ("path", "repository", "norm_topk_prob", "mrope_interleaved", "unsupported")


def check_reference(config: Config) -> None:
    """
    Raises:
        ConfigError: the engines, which have the shape of model.hf_dir, could not take its weights.
    """
    folder, own = config.objective.reference_dir, config.model.hf_dir
    readers = [dict(each).get("reader") for each in config.objective.passes]
    if not folder or "reference" not in (*config.evaluate.controls, *readers):
        return
    key, remedy = "objective.reference_dir", "Give the folder of the weights that training began with."
    there = (Path(folder) / "config.json").is_file()
    require(there, key, folder, "a model directory in Hugging Face format, which holds a config.json", remedy)
    model, start = read_hf_config(own), read_hf_config(folder)
    for name in (each.name for each in fields(model) if each.name not in _MAY_DIFFER):
        wanted, found = getattr(model, name), getattr(start, name)
        allowed = f"a model such as model.hf_dir={own!r}, where {name} is {wanted!r}, and not {found!r}"
        require(wanted == found, key, folder, allowed, remedy)
