"""Hugging Face model folders: tensors by name out of their safetensors files, and new folders of the same kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_sr1.config import Family, PixelLimits, write_pixel_limits
from megatron_sr1.weights.hf_shards import MAX_SHARD_BYTES, GrowingShards
from megatron_sr1.weights.safetensors import TensorInfo, TensorSlot, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 256 << 20  # a long tensor is streamed in pieces of about this many bytes
_SIDE_FILES = (".json", ".txt", ".jinja", ".model")  # configuration, tokenizer, chat template, processor


class HfTensors:
    """Reads tensors by name from the safetensors files of a Hugging Face folder. Opening it reads headers only."""

    def __init__(self, hf_dir: str | Path, family: Family | None = None) -> None:
        """
        Args:
            family: whose names the tensors get, however the files spell them; None: they are as in the files.

        Raises:
            ValueError: no safetensors weights; a file that is missing, truncated or corrupt, or that lacks a tensor
                which the index puts there; two tensors of one name.
        """
        self.folder = Path(hf_dir)
        if (self.folder / INDEX).is_file():
            self.slots = self._indexed()
            single = self.folder / SINGLE
            if single.is_file() and all(slot.file != single for slot in self.slots.values()):
                raise ValueError(
                    f"{hf_dir} holds two sets of weights: {SINGLE}, and the files of {INDEX}. Remove the older one."
                )
        elif (self.folder / SINGLE).is_file():
            self.slots = read_header(self.folder / SINGLE)
        else:
            raise ValueError(f"{hf_dir} holds neither {INDEX} nor {SINGLE}. Give a model saved in safetensors format.")
        if family is not None:
            self.slots = self._renamed(family)
        self.tensors: Mapping[str, TensorInfo] = {name: slot.info for name, slot in self.slots.items()}

    def _indexed(self) -> dict[str, TensorSlot]:
        path = self.folder / INDEX
        try:
            files = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is corrupt: it has no readable weight_map ({error!r}). Copy it again.") from error
        if strange := [name for name in files.values() if not isinstance(name, str) or Path(name).name != name]:
            raise ValueError(f"{path} is corrupt: {strange[0]!r} is no name of a file beside it. Copy it again.")
        headers = {name: read_header(self.folder / name) for name in sorted(set(files.values()))}
        for name, file in files.items():
            if name not in headers[file]:
                raise ValueError(
                    f"{path} puts tensor {name!r} into {file}, which does not hold it. Copy both files again."
                )
        return {name: headers[file][name] for name, file in files.items()}

    def _renamed(self, family: Family) -> dict[str, TensorSlot]:
        renamed: dict[str, TensorSlot] = {}
        for name, slot in self.slots.items():
            if family.tensor_name(name) in renamed:
                raise ValueError(
                    f"{self.folder} holds {family.tensor_name(name)} under two names, one is {name}. Remove the tensor "
                    "that is wrong."
                )
            renamed[family.tensor_name(name)] = slot
        return renamed

    def slot(self, name: str) -> TensorSlot:
        """Raises ValueError where the folder has no such tensor."""
        if name not in self.slots:
            raise ValueError(f"{self.folder} has no tensor {name!r}, which the model's config.json calls for.")
        return self.slots[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.slot(name).read()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; for experts in one tensor, a row is an expert."""
        return self.slot(name).read(start, stop)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The whole tensor, some rows at a time, each piece with the number of its first row."""
        slot = self.slot(name)
        for start, stop in row_blocks(slot.info):
            yield start, slot.read(start, stop)


def row_blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about PIECE_BYTES that cover a tensor."""
    step = max(1, PIECE_BYTES // max(1, info.row_bytes))
    for start in range(0, info.num_rows, step):
        yield start, min(start + step, info.num_rows)


def check_finite(tensor: Tensor, name: str, place: Path, first_row: int = 0) -> None:
    """Raises:
    ValueError: a value is not a number or infinite; the message names the first.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8-bit floats have no arithmetic
    if torch.isfinite(torch.stack(torch.aminmax(values))).all():
        return
    index = torch.nonzero(~torch.isfinite(values))[0].tolist()
    value = values[tuple(index)].item()
    if index:
        index[0] += first_row
    raise ValueError(f"{place}: {name}{index} is {value}. These weights are damaged: take an earlier checkpoint.")


def copy_side_files(source_dir: str | Path, out_dir: Path, *, pixels: PixelLimits | None = None) -> None:
    """Copies configuration, tokenizer and processor files; weights and their index are left out.

    Args:
        pixels: limits that the model was trained with, which its image processor's files get; None: those they state.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(source_dir).iterdir()):
        if file.is_file() and file.suffix in _SIDE_FILES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out_dir / file.name)  # whoever may read the source, the umask says here
    if pixels is not None:
        write_pixel_limits(out_dir, pixels)


def write_hf_dir(
    weights: Iterable[tuple[str, Tensor]],
    source_dir: str,
    out_dir: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    pixels: PixelLimits | None = None,
) -> None:
    """Writes safetensors files and copies configuration, tokenizer and processor files of `source_dir`.

    Tensors go to the disk one by one. The folder appears under its name only when it is complete.

    Args:
        pixels: see `copy_side_files`.
    """
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = GrowingShards(partial, max_shard_bytes)
    for name, tensor in weights:
        shards.append(name, tensor)
    shards.finish()
    copy_side_files(source_dir, partial, pixels=pixels)
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.rename(out_dir)
