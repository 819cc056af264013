"""Hugging Face <-> Megatron-Core weights."""

from megatron_sr1.convert.greedy import compare_greedy
from megatron_sr1.convert.table import WeightRule, hf_from_shards, language_rules, shard_from_hf, vision_rule
from megatron_sr1.convert.weights import export_hf_weights, load_hf_weights, stage_parameters, write_hf_dir

__all__ = [
    "WeightRule",
    "compare_greedy",
    "export_hf_weights",
    "hf_from_shards",
    "language_rules",
    "load_hf_weights",
    "shard_from_hf",
    "stage_parameters",
    "vision_rule",
    "write_hf_dir",
]
