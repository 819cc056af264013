"""Hugging Face weights into a Megatron checkpoint, piece by piece: memory holds one piece and what it is made of.

The result is what `dist_checkpointing.save` writes, format torch_dist: `.metadata` (the index of pieces that
torch.distributed.checkpoint reads), data files, `common.pt` and `metadata.json`. torch's own writer keeps every tensor
of a file alive until the file is closed, so the data files are written here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sr1.config import HfConfig
from megatron_sr1.convert.check import (
    check_shapes,
    published_experts,
    stored_dtypes,
)
from megatron_sr1.convert.layout import (
    HF_FOLDER,
    HfLayout,
    ParameterSlot,
    assign,
    model_slots,
)
from megatron_sr1.platform import Platform
from megatron_sr1.platform.torch_private import StorageInfo
from megatron_sr1.policy.read import open_tensors
from megatron_sr1.weights.check import stores_tied_head
from megatron_sr1.weights.hf_dir import HfTensors, check_finite, copy_side_files, row_blocks
from megatron_sr1.weights.kept import write_kept
from megatron_sr1.weights.name_table import REORDERED, shard_from_hf
from megatron_sr1.weights.pickles import BACKEND, COMMON
from megatron_sr1.weights.safetensors import TensorInfo


@dataclass(frozen=True)
class TensorPiece:
    """Rows of a parameter that are written together."""

    slot: ParameterSlot
    start: int
    stop: int
    info: TensorInfo  # of the piece

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.slot.key, self.slot.offsets(self.start))


def hf_to_megatron(hf_dir: str, out_dir: Path, platform: Platform, advance: Callable[[int, int], None]) -> None:
    """Writes a checkpoint into `out_dir`, an empty folder. All ranks call it and share the work.

    Args:
        advance: told the bytes that this rank has done, and those it has to do.

    Raises:
        ValueError: naming the file and the tensor: missing, extra, misshaped, truncated, not finite.
    """
    slots = model_slots(hf_dir)
    tensors = open_tensors(slots.architecture)
    check_shapes(slots, tensors)
    dtypes = stored_dtypes(slots, tensors)
    pieces = [piece for slot in slots.parameters for piece in _pieces(slot, dtypes[slot.key])]
    mine = assign(pieces, [piece.info.nbytes for piece in pieces], platform.world_size)[platform.rank]
    written = _write(mine, tensors, slots.architecture, out_dir / f"__{platform.rank}_0.distcp", advance)
    gathered: list[list[WriteResult]] = [[] for _ in range(platform.world_size)]
    torch.distributed.all_gather_object(gathered, written)
    if platform.is_main:
        assert sum(len(results) for results in gathered) == len(pieces)
        copy_side_files(hf_dir, out_dir / HF_FOLDER)
        write_kept(tensors, slots.architecture.family, out_dir)
        HfLayout(published_experts(slots, tensors), stores_tied_head(tensors, slots.architecture)).write(out_dir)
        torch.save({}, out_dir / COMMON)
        FileSystemWriter(out_dir).finish(_metadata(pieces), gathered)
        save_config(CheckpointingConfig(BACKEND), str(out_dir))
    torch.distributed.barrier()


def _pieces(slot: ParameterSlot, dtype: torch.dtype) -> Iterator[TensorPiece]:
    whole = TensorInfo(dtype, slot.shape)
    if slot.rule.kind == "gate_up":
        half = TensorInfo(dtype, (slot.shape[0] // 2, *slot.shape[1:]))
        blocks = [(row + start, row + stop) for row in (0, half.num_rows) for start, stop in row_blocks(half)]
    elif slot.rule.kind in REORDERED or slot.rule.expert is not None:
        blocks = [(0, whole.num_rows)]  # their rows are not in the order of the Hugging Face tensors
    else:
        blocks = list(row_blocks(whole))
    for start, stop in blocks:
        shape = (stop - start, *slot.shape[1:]) if slot.shape else ()
        yield TensorPiece(slot, start, stop, TensorInfo(dtype, shape))


def _read(piece: TensorPiece, tensors: HfTensors, sizes: HfConfig) -> Tensor:
    """The values of a piece; only the rows that it is made of are read."""
    rule, start, stop = piece.slot.rule, piece.start, piece.stop
    if rule.kind in REORDERED or rule.expert is not None:
        rows = [(0, None) if rule.expert is None else (rule.expert, rule.expert + 1)] * len(rule.hf)
        parts = [_checked(tensors, name, *row) for name, row in zip(rule.hf, rows, strict=True)]
        parts = parts if rule.expert is None else [part[0] for part in parts]
        return shard_from_hf(rule, parts, sizes, 0, 1)
    if rule.kind == "gate_up":
        number, first = divmod(start, piece.slot.shape[0] // 2)
        return _checked(tensors, rule.hf[number], first, first + stop - start)
    if rule.kind == "vocabulary" and stop > sizes.vocab_size:  # rows that fill up the last rank's part
        filled = torch.zeros(piece.info.shape, dtype=piece.info.dtype)
        filled[: sizes.vocab_size - start] = _checked(tensors, rule.hf[0], start, sizes.vocab_size)
        return filled
    return _checked(tensors, rule.hf[0], start, stop)


def _checked(tensors: HfTensors, name: str, start: int, stop: int | None) -> Tensor:
    rows = tensors.slot(name).read(start, stop)
    check_finite(rows, name, tensors.slot(name).file, start)
    return rows


def _write(
    pieces: list[TensorPiece], tensors: HfTensors, sizes: HfConfig, file: Path, advance: Callable[[int, int], None]
) -> list[WriteResult]:
    total = sum(piece.info.nbytes for piece in pieces)
    results = []
    with file.open("wb") as stream, _without_checksums():
        for piece in pieces:
            value = _read(piece, tensors, sizes).contiguous()
            assert TensorInfo(value.dtype, tuple(value.shape)) == piece.info, (piece, value.shape)
            offset = stream.tell()
            torch.save(value.view(piece.slot.sizes(piece.stop - piece.start)), stream)
            place = StorageInfo(file.name, offset, stream.tell() - offset)
            results.append(WriteResult(piece.index, place.length, place))
            advance(piece.info.nbytes, total)
        stream.flush()
        os.fsync(stream.fileno())
    return results


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save without CRC-32, which nothing that loads a checkpoint looks at and which takes most of the time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _metadata(pieces: list[TensorPiece]) -> Metadata:
    tensors: dict[str, TensorStorageMetadata] = {}
    for piece in pieces:
        slot = piece.slot
        size = torch.Size((*slot.leading, *slot.shape))
        entry = tensors.setdefault(slot.key, TensorStorageMetadata(TensorProperties(piece.info.dtype), size, []))
        chunk = ChunkStorageMetadata(
            torch.Size(slot.offsets(piece.start)), torch.Size(slot.sizes(piece.stop - piece.start))
        )
        entry.chunks.append(chunk)
    _check_cover(tensors)
    return Metadata(state_dict_metadata=dict(tensors))


def _check_cover(tensors: Mapping[str, TensorStorageMetadata]) -> None:
    for key, entry in tensors.items():
        assert sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel(), key
