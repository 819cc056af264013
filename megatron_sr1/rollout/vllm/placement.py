"""Where each tensor of a checkpoint lies in vLLM's model on this tensor-parallel rank: an independent statement of how
vLLM fuses (q, k, v; gate, up; the experts) and splits, against which its loaded weights are checked.

    N, K  rows and columns of a whole weight        tp  ranks of the engine
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# a module of the checkpoint -> the module that vLLM fuses it into, and its place in there
_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "in_proj_z": ("in_proj_qkvz", 3),
    "in_proj_b": ("in_proj_ba", 0),
    "in_proj_a": ("in_proj_ba", 1),
}
# of a gated delta rule: queries, keys and values are one tensor in the checkpoint, and are split each for itself
_DELTA = {"in_proj_qkv": "in_proj_qkvz", "conv1d": "conv1d"}
_EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}


@dataclass(frozen=True)
class Placement:
    """One piece of a checkpoint tensor, and the rows of the engine's parameter that must equal it."""

    module: str
    parameter: str  # of the module
    take: Callable[[Tensor], Tensor]  # this rank's piece of the whole tensor
    start: int | None  # first row of the piece in the parameter; None: all of it, experts in the order of the kernel


def placements(modules: Mapping[str, torch.nn.Module], name: str) -> list[Placement]:
    """The pieces of checkpoint tensor `name`, which is already under vLLM's prefixes (`hf_to_vllm_mapper`).

    Raises:
        ValueError: the engine has no module for it.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    path, _, parameter = name.rpartition(".")
    outer, _, last = path.rpartition(".")
    experts = modules.get(f"{path}.routed_experts")
    if isinstance(experts, RoutedExperts) and parameter in _EXPERTS:
        ranks = experts.moe_config.moe_parallel_config
        turned = experts.is_fused_checkpoint_transposed
        take = partial(_expert_piece, parameter, ranks.tp_rank, ranks.tp_size, turned)
        return [Placement(f"{path}.routed_experts", _EXPERTS[parameter], take, None)]
    if last in _DELTA and f"{outer}.{_DELTA[last]}" in modules:
        return _delta_pieces(modules[outer], f"{outer}.{_DELTA[last]}", parameter)
    fused, part = _FUSED.get(last, ("", 0))
    if f"{outer}.{fused}" in modules:
        path = f"{outer}.{fused}"
        return [Placement(path, parameter, *_fused_piece(modules[path], part))]
    if path not in modules:
        raise ValueError(f"weight update: the engine's model has no module for the tensor {name!r}.")
    return [Placement(path, parameter, take, start) for take, start in _pieces(modules[path], parameter)]


def _pieces(module: torch.nn.Module, parameter: str) -> list[tuple[Callable[[Tensor], Tensor], int]]:
    """Of a tensor that is a parameter of its own."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.mamba.gdn.base import GatedDeltaNetAttention
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(module, GatedDeltaNetAttention):  # a number for each value head
        return [(partial(_chunk, 0, module.tp_rank, module.tp_size), 0)]
    if isinstance(module, QKVParallelLinear):  # queries, keys and values are one tensor in the checkpoint, too
        pieces = []
        for part in range(3):
            take, start = _fused_piece(module, part)
            pieces.append((partial(_third, part, take), start))
        return pieces
    if isinstance(module, ColumnParallelLinear):
        return [(partial(_chunk, 0, module.tp_rank, module.tp_size), 0)]
    if isinstance(module, RowParallelLinear) and parameter == "weight":
        return [(partial(_chunk, 1, module.tp_rank, module.tp_size), 0)]
    if isinstance(module, VocabParallelEmbedding):
        shard = module.shard_indices
        return [(partial(_rows, shard.org_vocab_start_index, shard.org_vocab_end_index), 0)]
    return [(_whole, 0)]


def _delta_pieces(layer: Any, path: str, parameter: str) -> list[Placement]:
    """Of the tensor with the queries, keys and values of a gated delta rule, or of the convolution over them."""
    pieces, first = [], 0
    for size in (layer.key_dim, layer.key_dim, layer.value_dim):
        each = size // layer.tp_size
        start = first + layer.tp_rank * each
        pieces.append(Placement(path, parameter, partial(_rows, start, start + each), first // layer.tp_size))
        first += size
    return pieces


def _fused_piece(module: Any, part: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Of one tensor of several that are fused: what to take of it, and its first row in the parameter."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    if isinstance(module, QKVParallelLinear):
        queries, keys = module.num_heads * module.head_size, module.num_kv_heads * module.head_size  # of a rank
        # fewer key/value heads than ranks: neighbouring ranks hold the same head
        shard = module.tp_rank if part == 0 else module.tp_rank // module.num_kv_head_replicas
        size = queries if part == 0 else keys
        return partial(_rows, shard * size, (shard + 1) * size), (0, queries, queries + keys)[part]
    start = sum(module.output_sizes[:part]) // module.tp_size
    return partial(_chunk, 0, module.tp_rank, module.tp_size), start


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _rows(start: int, stop: int, tensor: Tensor) -> Tensor:
    return tensor[start:stop]


def _chunk(dim: int, rank: int, ranks: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(ranks, dim)[rank]


def _third(part: int, take: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return take(tensor.chunk(3)[part])


def _expert_piece(name: str, rank: int, ranks: int, turned: bool, tensor: Tensor) -> Tensor:
    """[E, out, in], from all experts as published: gate_up [E, H, 2I], down [E, I, H] where `turned`, else [E, out, in]
    as well."""
    tensor = tensor if turned else tensor.transpose(1, 2)
    halves = [tensor] if name == "down_proj" else tensor.chunk(2, 2)
    dim = 1 if name == "down_proj" else 2
    return torch.cat([half.chunk(ranks, dim)[rank] for half in halves], dim).transpose(1, 2).contiguous()
