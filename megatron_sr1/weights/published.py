"""The tensors of a Hugging Face folder as published checkpoints have them, and as vLLM reads them."""

from __future__ import annotations

from megatron_sr1.config import HfConfig
from megatron_sr1.types import NamedTensors
from megatron_sr1.weights.hf_dir import HfTensors
from megatron_sr1.weights.name_table import has_published_experts, language_rules


def turned_experts(tensors: HfTensors, sizes: HfConfig) -> set[str]:
    """Experts' tensors that lie as transformers saves them, [out, in], where published ones of the family do not."""
    if not sizes.family.experts_turned:
        return set()
    return {
        rule.hf[0]
        for rule in language_rules(sizes)
        if rule.expert == 0 and not has_published_experts(rule, tensors.tensors[rule.hf[0]].shape, sizes)
    }


def published_weights(tensors: HfTensors, sizes: HfConfig) -> NamedTensors:
    """Reads all tensors, one by one."""
    turned = turned_experts(tensors, sizes)
    return ((name, tensors[name].mT if name in turned else tensors[name]) for name in tensors.tensors)
