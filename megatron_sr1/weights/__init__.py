"""Hugging Face <-> Megatron-Core weights."""

from megatron_sr1.weights.check import check_tensors, check_values
from megatron_sr1.weights.export import export_hf_weights
from megatron_sr1.weights.hf_dir import HfTensors, copy_side_files, write_hf_dir
from megatron_sr1.weights.hf_share import HfShare
from megatron_sr1.weights.kept import kept_tensors, kept_weights
from megatron_sr1.weights.load import load_hf_weights, mark_shards, table_parameters
from megatron_sr1.weights.name_table import WeightRule, hf_from_shards, language_rules, shard_from_hf, vision_rule
from megatron_sr1.weights.pickles import ForeignCode, check_megatron_dir
from megatron_sr1.weights.published import published_weights, turned_experts

__all__ = [
    "ForeignCode",
    "HfShare",
    "HfTensors",
    "WeightRule",
    "check_megatron_dir",
    "check_tensors",
    "check_values",
    "copy_side_files",
    "export_hf_weights",
    "hf_from_shards",
    "kept_tensors",
    "kept_weights",
    "language_rules",
    "load_hf_weights",
    "mark_shards",
    "published_weights",
    "shard_from_hf",
    "table_parameters",
    "turned_experts",
    "vision_rule",
    "write_hf_dir",
]
