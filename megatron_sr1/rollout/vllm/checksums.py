"""Compares what the engine computes with against what it was sent, tensor by tensor, by checksums.

A checksum is the sum over all elements of (bits of the element in the engine's dtype) * (an odd number that belongs to
its position), modulo 2^64: one changed element always changes it. Experts on an accelerator are an exception: there
vLLM's kernels may reorder and zero-pad them, so the sum is of a scrambling of the bits that no position enters and that
maps 0 to 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.rollout.vllm.placement import Placement, placements
from megatron_sr1.rollout.vllm.private import packed_experts

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd, 2^64 / golden ratio: neighbouring positions get unlike factors
_BLOCK = 2**20  # elements whose 8-byte products exist at a time
_PROBE = 256  # columns of a weight that are read at a time
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Sent:
    """A piece of a tensor as it was sent."""

    name: str
    place: Placement
    num_rows: int
    checksum: Tensor  # [] int64, where the tensor was


class WeightCheck:
    """One weight update under observation: `sent` each tensor, then `differences`."""

    def __init__(self, model: Any) -> None:
        """`model` is vLLM's, before the update."""
        self._modules: dict[str, torch.nn.Module] = dict(model.named_modules())
        self._mapper = model.hf_to_vllm_mapper
        self._on_cpu = all(parameter.is_cpu for parameter in model.parameters())
        self._dtype = max(model.parameters(), key=torch.Tensor.numel).dtype
        self._unseen = {  # a tied weight once for each module: each may have packed it for itself
            f"{path}.{name}"
            for path, module in self._modules.items()
            for name, _ in module.named_parameters(recurse=False)
        }
        self._heads = _tied_heads(self._modules)
        self._sent: dict[tuple[str, str], list[_Sent]] = {}  # by module and parameter

    def sent(self, name: str, tensor: Tensor) -> None:
        """Takes note of a tensor, by its checkpoint name, on its way into the engine.

        Raises:
            ValueError: the engine has no place for it.
        """
        (mapped,) = self._mapper.apply_list([name])
        for place in placements(self._modules, mapped):
            piece = place.take(tensor).to(self._dtype)
            if place.start is None and self._on_cpu:
                piece = packed_experts(self._modules[place.module], piece)
            rows = _as_rows(piece)
            checksum = self._sum_of_experts(piece) if place.start is None else _ordered(rows, 0, rows.shape[1])
            for module in (place.module, *self._heads.get(place.module, ())):
                key = (module, place.parameter)
                self._sent.setdefault(key, []).append(_Sent(name, place, len(rows), checksum))
                self._unseen.discard(".".join(key))

    def differences(self) -> list[str]:
        """Checkpoint tensors that the engine does not hold as they were sent, and parameters of the engine that none
        was sent for."""
        names: list[str] = []
        differ: list[Tensor] = []
        for (module, parameter), pieces in self._sent.items():
            held = self._held(self._modules[module], parameter, pieces)
            names += [piece.name for piece in pieces]
            differ += [found != piece.checksum.to(found.device) for piece, found in zip(pieces, held, strict=True)]
        flags = torch.stack(differ).tolist() if differ else []  # the one place where the host waits for the device
        wrong = dict.fromkeys(name for name, differs in zip(names, flags, strict=True) if differs)
        return [*wrong, *sorted(self._unseen)]

    def _held(self, module: torch.nn.Module, parameter: str, pieces: list[_Sent]) -> list[Tensor]:
        """The checksum of each piece as the module has it."""
        tensor = module.get_parameter(parameter)
        if pieces[0].place.start is None:
            assert len(pieces) == 1, "experts are one tensor"
            return [self._sum_of_experts(tensor.to(self._dtype))]
        sums = [torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in pieces]
        for first_column, num_columns, block in self._blocks(module, parameter, tensor):
            for index, piece in enumerate(pieces):
                assert piece.place.start is not None
                rows = block[piece.place.start : piece.place.start + piece.num_rows]
                sums[index] += _ordered(rows, first_column, num_columns)
        return sums

    def _sum_of_experts(self, tensor: Tensor) -> Tensor:
        rows = _as_rows(tensor)
        return _ordered(rows, 0, rows.shape[1]) if self._on_cpu else _unordered(tensor)

    def _blocks(self, module: Any, parameter: str, tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """First column, number of columns of the whole, and the block of columns itself.

        On a CPU vLLM multiplies by a packed copy of a linear layer's weight and drops the weight. The product with unit
        vectors gives the columns back exactly: every sum has one term that is not 0.
        """
        if parameter != "weight" or not _is_packed(module, tensor):
            rows = _as_rows(tensor.to(self._dtype))
            yield 0, rows.shape[1], rows
            return
        width = tensor.shape[1] if tensor.numel() else _input_size(module)
        for start in range(0, width, _PROBE):
            stop = min(start + _PROBE, width)
            units = torch.zeros(stop - start, width, dtype=self._dtype)
            units[torch.arange(stop - start), torch.arange(start, stop)] = 1
            yield start, width, module.quant_method.apply(module, units, None).T


def _input_size(module: Any) -> int:
    """Columns of this rank's shard of a linear layer's weight."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    return module.input_size_per_partition if isinstance(module, RowParallelLinear) else module.input_size


def _is_packed(module: torch.nn.Module, weight: Tensor) -> bool:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    packs = isinstance(module, LinearBase) and weight.numel() == 0
    return packs or (isinstance(module, ParallelLMHead) and weight.device.type == "cpu")


def _tied_heads(modules: dict[str, torch.nn.Module]) -> dict[str, list[str]]:
    """Output heads that compute with an embedding's weight, by the embedding's name."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    embeddings = {name: module for name, module in modules.items() if isinstance(module, VocabParallelEmbedding)}
    return {
        name: [other for other, head in embeddings.items() if other != name and head.weight is module.weight]
        for name, module in embeddings.items()
        if not isinstance(module, ParallelLMHead)
    }


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1)


def _ordered(rows: Tensor, first_column: int, num_columns: int) -> Tensor:
    """Of a block of a matrix of `num_columns` columns; blocks add up to the whole. Sums of int64 wrap around."""
    columns = torch.arange(first_column, first_column + rows.shape[1], device=rows.device)
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        index = torch.arange(start, start + len(part), device=rows.device)[:, None]
        factors = (index * num_columns + columns) * _GOLDEN | 1
        total += (_bits(part) * factors).sum()
    return total


def _unordered(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in tensor.reshape(-1).split(_BLOCK):
        mixed = _bits(part) * _GOLDEN
        total += ((mixed ^ (mixed >> 29)) * _GOLDEN).sum()
    return total


def _bits(values: Tensor) -> Tensor:
    """[..] int64; both zeros are the same number, as a sum of products cannot tell them apart."""
    return (values + 0.0).view(_BITS[values.element_size()]).long()
