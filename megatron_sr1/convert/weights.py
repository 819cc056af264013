"""Moves weights between a rank's chunks of the policy and Hugging Face names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.convert.hf_dir import HfTensors
from megatron_sr1.convert.table import (
    Sizes,
    WeightRule,
    canonical_name,
    hf_from_shards,
    language_rules,
    shard_from_hf,
    vision_rule,
)

_LAYER = "decoder.layers."
_EXPERT_KINDS = ("expert_gate_up", "expert_down")


class Groups(Protocol):
    """The process groups that share one copy of the weights."""

    @property
    def tensor(self) -> ProcessGroup: ...
    @property
    def pipeline(self) -> ProcessGroup: ...
    @property
    def expert(self) -> ProcessGroup: ...


def table_parameters(
    chunks: Sequence[torch.nn.Module], sizes: Sizes, expert_rank: int = 0, expert_ranks: int = 1
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
def load_hf_weights(chunks: Sequence[torch.nn.Module], hf_dir: str, sizes: Sizes, groups: Groups) -> None:
    """Fills the parameters from `hf_dir`.

    Raises:
        ValueError: a tensor is missing or has another shape than the model.
    """
    tensors = HfTensors(hf_dir)
    for name, (rule, parameter) in _mine(chunks, sizes, groups).items():
        is_expert = rule.kind in _EXPERT_KINDS
        place = (0, 1) if is_expert else (groups.tensor.rank(), groups.tensor.size())
        parts = [
            tensors[x] if rule.expert is None else tensors.rows(x, rule.expert, rule.expert + 1)[0] for x in rule.hf
        ]
        shard = shard_from_hf(rule, parts, sizes, *place)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{hf_dir}: {', '.join(rule.hf)} give {name} the shape {tuple(shard.shape)}, but the model has "
                f"{tuple(parameter.shape)}. config.json and weights do not belong together."
            )
        parameter.copy_(shard)


def mark_shards(chunks: Sequence[torch.nn.Module], sizes: Sizes, groups: Groups) -> None:
    """Tells Megatron which parameters are shards of a tensor, and which are an expert's.

    It marks shards only when it initialises them itself. Unmarked, they would be taken for copies of one tensor and
    left out of the gradient norm on every tensor-parallel rank but the first. Experts it marks only where expert
    parallelism is above 1. Unmarked, their gradients would not be added over the tensor-parallel ranks, which send them
    different tokens.
    """
    for rule, parameter in _mine(chunks, sizes, groups).values():
        if rule.kind in _EXPERT_KINDS:
            parameter.allreduce = False
        if rule.kind != "replicated" and "tensor_model_parallel" not in vars(parameter):
            set_tensor_model_parallel_attributes(parameter, True, 1 if rule.kind == "columns" else 0, 1)


def _mine(
    chunks: Sequence[torch.nn.Module], sizes: Sizes, groups: Groups
) -> dict[str, tuple[WeightRule, torch.nn.Parameter]]:
    return table_parameters(chunks, sizes, groups.expert.rank(), groups.expert.size())


@torch.no_grad()
def export_hf_weights(
    chunks: Sequence[torch.nn.Module],
    sizes: Sizes,
    groups: Groups,
    read: Callable[[torch.nn.Parameter], Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the whole model under its Hugging Face name, on every rank. All ranks iterate together.

    Memory beyond the model: one tensor and its gathered copy.

    Args:
        read: what of a parameter is exported, in its shape: its value, or for example its gradient.
    """
    local = {
        rule: read(parameter) if parameter.requires_grad else parameter.detach()
        for rule, parameter in _mine(chunks, sizes, groups).values()
    }
    mine = {rule: (value.shape, value.dtype) for rule, value in local.items()}
    stages = [mine] * groups.pipeline.size()
    torch.distributed.all_gather_object(stages, mine, group=groups.pipeline)
    device = next(chunks[0].parameters()).device
    seen: set[str] = set()
    for owner, contents in enumerate(stages):
        for rules in _by_tensors(contents):
            if not seen.isdisjoint(rules[0].hf):  # a tied head is the embedding of the first stage
                continue
            seen.update(rules[0].hf)
            values = []
            for rule in rules:
                shape, dtype = contents[rule]
                value = local[rule] if rule in local else torch.empty(shape, dtype=dtype, device=device)
                values.append(_from_stage(value, owner, groups.pipeline))
            yield from zip(rules[0].hf, _whole(rules, values, sizes, groups), strict=True)


def _by_tensors(rules: Iterable[WeightRule]) -> list[list[WeightRule]]:
    """Rules that name the same tensors together: one, or those of a rank's experts in order."""
    groups: dict[tuple[str, ...], list[WeightRule]] = {}
    for rule in rules:
        groups.setdefault((rule.kind, *rule.hf), []).append(rule)
    return list(groups.values())


def _from_stage(value: Tensor, owner: int, pipeline: ProcessGroup) -> Tensor:
    """The value that pipeline rank `owner` holds, on all stages."""
    if pipeline.size() == 1:
        return value
    value = value.clone(memory_format=torch.contiguous_format)
    torch.distributed.broadcast(value, torch.distributed.get_process_group_ranks(pipeline)[owner], group=pipeline)
    return value


def _whole(rules: list[WeightRule], values: list[Tensor], sizes: Sizes, groups: Groups) -> list[Tensor]:
    """The Hugging Face tensors of the rules, from this rank's shard or experts and those of its peers."""
    rule = rules[0]
    if rule.kind not in _EXPERT_KINDS:
        shards = values if rule.kind == "replicated" else _gather(values[0], groups.tensor)
        return hf_from_shards(rule, shards, sizes)
    per_expert = [_gather(value, groups.expert) for value in values]  # [local expert][rank]
    in_order = [slot[rank] for rank in range(groups.expert.size()) for slot in per_expert]
    return [torch.stack([hf_from_shards(rule, [value], sizes)[0] for value in in_order])]


def _gather(value: Tensor, group: ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [value]
    shards = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(shards, value.contiguous(), group=group)
    return shards
