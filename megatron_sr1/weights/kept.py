"""Tensors of a checkpoint that no part of the policy is, such as the heads that predict further tokens: they are not
trained, and go through conversion and export as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from megatron_sr1.config import Family
from megatron_sr1.weights.hf_dir import INDEX, SINGLE, HfTensors
from megatron_sr1.weights.hf_shards import MAX_SHARD_BYTES, PlannedShards
from megatron_sr1.weights.safetensors import TensorSlot

KEPT = "hf_kept"  # in a Megatron checkpoint that was made of a Hugging Face folder: a folder with these tensors alone


def kept_tensors(folder: str | Path, family: Family) -> Mapping[str, TensorSlot]:
    """Those of a Hugging Face folder, or of a Megatron checkpoint, by name; none where it has no such files.

    Raises:
        ValueError: see `HfTensors`.
    """
    if not family.kept_prefixes:
        return {}
    for place in (Path(folder) / KEPT, Path(folder)):
        if (place / INDEX).is_file() or (place / SINGLE).is_file():
            slots = HfTensors(place, family).slots
            return {name: slot for name, slot in slots.items() if family.is_kept(name)}
    return {}


def kept_weights(folders: tuple[str, ...], family: Family) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the first folder that has any."""
    for folder in folders:
        if found := kept_tensors(folder, family):
            yield from ((name, slot.read()) for name, slot in found.items())
            return


def write_kept(tensors: HfTensors, family: Family, folder: Path) -> None:
    """Puts the tensors of a Hugging Face folder into a Megatron checkpoint; one that has none gets nothing."""
    names = [name for name in tensors.tensors if family.is_kept(name)]
    if not names:
        return
    shards = PlannedShards(folder / KEPT, {name: tensors.tensors[name] for name in names}, MAX_SHARD_BYTES)
    shards.create()
    for name in names:
        for row, piece in tensors.pieces(name):
            shards.write(name, piece, row)
    shards.sync()
