"""Fills a rank's chunks of the policy from Hugging Face tensors, and finds their parameters in the name table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch.distributed import ProcessGroup

from megatron_sr1.config import HfConfig
from megatron_sr1.weights.hf_dir import HfTensors, check_finite
from megatron_sr1.weights.name_table import (
    WeightRule,
    canonical_name,
    language_rules,
    shard_from_hf,
    vision_rule,
)

_LAYER = "decoder.layers."
EXPERT_KINDS = ("expert_gate_up", "expert_down")


class Groups(Protocol):
    """The process groups that share one copy of the weights."""

    @property
    def tensor(self) -> ProcessGroup: ...
    @property
    def pipeline(self) -> ProcessGroup: ...
    @property
    def expert(self) -> ProcessGroup: ...


def table_parameters(
    chunks: Sequence[torch.nn.Module], sizes: HfConfig, expert_rank: int = 0, expert_ranks: int = 1
) -> dict[str, tuple[WeightRule, torch.nn.Parameter]]:
    """The chunks' parameters with their rules, by the table's names.

    Args:
        expert_rank: which of the `expert_ranks` equal shares of the experts this rank holds.
    """
    table = {rule.megatron: rule for rule in language_rules(sizes)}
    found = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(_LAYER):
                local, rest = name.removeprefix(_LAYER).split(".", 1)
                name = f"{_LAYER}{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
            name = canonical_name(name, first_expert=expert_rank * sizes.num_experts // expert_ranks)
            found[name] = (table[name] if name in table else vision_rule(name, sizes), parameter)
    return found


@torch.no_grad()
def load_hf_weights(chunks: Sequence[torch.nn.Module], tensors: HfTensors, sizes: HfConfig, groups: Groups) -> None:
    """Fills the parameters from the tensors of a folder.

    Raises:
        ValueError: a tensor is missing, has another shape than the model or holds a value that is not finite.
    """
    for name, (rule, parameter) in local_parameters(chunks, sizes, groups).items():
        is_expert = rule.kind in EXPERT_KINDS
        place = (0, 1) if is_expert else (groups.tensor.rank(), groups.tensor.size())
        parts = [
            tensors[x] if rule.expert is None else tensors.rows(x, rule.expert, rule.expert + 1)[0] for x in rule.hf
        ]
        for part, name_there in zip(parts, rule.hf, strict=True):
            check_finite(part, name_there, tensors.slot(name_there).file)
        shard = shard_from_hf(rule, parts, sizes, *place)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{tensors.folder}: {', '.join(rule.hf)} give {name} the shape {tuple(shard.shape)}, but the model has "
                f"{tuple(parameter.shape)}. config.json and weights do not belong together."
            )
        parameter.copy_(shard)


def mark_shards(chunks: Sequence[torch.nn.Module], sizes: HfConfig, groups: Groups) -> None:
    """Tells Megatron which parameters are shards of a tensor, and which are an expert's.

    It marks shards only when it initialises them itself. Unmarked, they would be taken for copies of one tensor and
    left out of the gradient norm on every tensor-parallel rank but the first. Experts it marks only where expert
    parallelism is above 1. Unmarked, their gradients would not be added over the tensor-parallel ranks, which send them
    different tokens.
    """
    for rule, parameter in local_parameters(chunks, sizes, groups).values():
        if rule.kind in EXPERT_KINDS:
            parameter.allreduce = False
        if rule.kind != "replicated" and "tensor_model_parallel" not in vars(parameter):
            set_tensor_model_parallel_attributes(parameter, True, 1 if rule.kind == "columns" else 0, 1)


def local_parameters(
    chunks: Sequence[torch.nn.Module], sizes: HfConfig, groups: Groups
) -> dict[str, tuple[WeightRule, torch.nn.Parameter]]:
    """`table_parameters` of this rank's share of the experts."""
    return table_parameters(chunks, sizes, groups.expert.rank(), groups.expert.size())
