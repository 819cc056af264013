"""Compares two checkpoints, each a Hugging Face folder or a Megatron checkpoint, tensor by tensor and bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_sr1.config import read_hf_config
from megatron_sr1.convert.layout import config_dir
from megatron_sr1.convert.load import MegatronSource
from megatron_sr1.weights.hf_dir import HfTensors
from megatron_sr1.weights.pickles import FORMAT, METADATA
from megatron_sr1.weights.safetensors import TensorInfo

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to compare bits, so that NaN equals NaN


class TensorSource(Protocol):
    """Tensors under their Hugging Face names, read some rows at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Pieces in order, each with the number of its first row."""
        ...


@dataclass(frozen=True)
class TensorDifference:
    """The first element, in memory order, that differs."""

    index: tuple[int, ...]
    first: float
    second: float


@dataclass(frozen=True)
class Comparison:
    """One tensor in both checkpoints. A hash is the SHA-256 of the tensor's bytes."""

    name: str
    first: TensorInfo | None  # None: the checkpoint does not have it
    second: TensorInfo | None
    first_hash: str | None
    second_hash: str | None
    difference: TensorDifference | None  # where both have the same type and shape

    @property
    def equal(self) -> bool:
        return self.first == self.second and self.first_hash == self.second_hash


def is_megatron_dir(folder: Path) -> bool:
    """Whether a folder is a Megatron checkpoint, not a Hugging Face one."""
    return (folder / METADATA).is_file() or (folder / FORMAT).is_file()


def open_checkpoint(folder: str, hf_dir: str | None) -> TensorSource:
    """Opens a checkpoint of either kind.

    Args:
        hf_dir: of the model's config.json, for a Megatron checkpoint that brings none along.

    Raises:
        ValueError: the folder is neither, or not complete.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{folder} is no folder. Give a Hugging Face folder or a Megatron checkpoint.")
    if not is_megatron_dir(path):
        return HfTensors(path, read_hf_config(folder).family)
    return MegatronSource(path, config_dir(path, hf_dir))


def compare(first: TensorSource, second: TensorSource, advance: Callable[[int, int], None]) -> Iterator[Comparison]:
    """Every tensor that either has, in the order of the first. `advance` is told the bytes done, and all there are."""
    names = [*first.tensors, *(name for name in second.tensors if name not in first.tensors)]
    total = sum(info.nbytes for source in (first, second) for info in source.tensors.values())
    for name in names:
        infos = [source.tensors.get(name) for source in (first, second)]
        hashes = [_hash(source, name) if name in source.tensors else None for source in (first, second)]
        difference = None
        if infos[0] == infos[1] and hashes[0] != hashes[1]:
            difference = _first_difference(first, second, name)
        advance(sum(info.nbytes for info in infos if info is not None), total)
        yield Comparison(name, infos[0], infos[1], hashes[0], hashes[1], difference)


def _flat(source: TensorSource, name: str) -> Iterator[Tensor]:
    for _, piece in source.pieces(name):
        yield piece.contiguous().reshape(-1)


def _hash(source: TensorSource, name: str) -> str:
    digest = hashlib.sha256()
    for piece in _flat(source, name):
        digest.update(piece.view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_difference(first: TensorSource, second: TensorSource, name: str) -> TensorDifference:
    """Both tensors side by side; their pieces need not have the same lengths."""
    info = first.tensors[name]
    streams = (_flat(first, name), _flat(second, name))
    buffers = [next(stream) for stream in streams]
    position = 0
    while True:
        length = min(len(buffer) for buffer in buffers)
        heads = [buffer[:length] for buffer in buffers]
        bits = [head.view(_INTEGERS[info.dtype.itemsize]) for head in heads]
        unequal = torch.nonzero(bits[0] != bits[1])
        if len(unequal):
            at = int(unequal[0])
            index = torch.unravel_index(torch.tensor(position + at), info.shape) if info.shape else ()
            return TensorDifference(tuple(int(i) for i in index), float(heads[0][at]), float(heads[1][at]))
        position += length
        buffers = [
            buffer[length:] if len(buffer) > length else next(stream)
            for buffer, stream in zip(buffers, streams, strict=True)
        ]
