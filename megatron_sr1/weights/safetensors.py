"""The safetensors file format: a length (8 bytes, little endian), a JSON header padded with spaces, the tensors' bytes.

Source: github.com/huggingface/safetensors, README, "Format". Files are read and written with plain positioned reads and
writes, so memory holds the rows asked for and never a mapped file, and several processes may fill one file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8  # of the header's end, so that tensors may be mapped
_IO_BYTES = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_rows(self) -> int:
        """Entries of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class TensorSlot:
    """A tensor's place in a file."""

    file: Path
    offset: int  # of its first byte
    info: TensorInfo

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) in memory of their own.

        Raises:
            ValueError: the file has become shorter than its header says.
        """
        stop = self.info.num_rows if stop is None else stop
        rows = torch.empty((stop - start) * self.info.row_bytes, dtype=torch.uint8, device="cpu")
        with self.file.open("rb", buffering=0) as file:
            _move(os.preadv, file.fileno(), rows, self.offset + start * self.info.row_bytes, self.file)
        shape = (stop - start, *self.info.shape[1:]) if self.info.shape else ()
        return rows.view(self.info.dtype).view(shape)

    def write(self, tensor: Tensor, start: int = 0) -> None:
        """Puts rows [start, start + len(tensor)) into the file, which has its full length already."""
        assert tensor.dtype == self.info.dtype and tensor.shape[1:] == self.info.shape[1:], (self, tensor.shape)
        offset = start * self.info.row_bytes
        rows = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert offset + rows.numel() <= self.info.nbytes, (self, start, tensor.shape)
        descriptor = os.open(self.file, os.O_WRONLY)
        try:
            _move(os.pwritev, descriptor, rows, self.offset + offset, self.file)
        finally:
            os.close(descriptor)


def read_header(path: Path) -> dict[str, TensorSlot]:
    """The tensors of a file, in the order of their names in the header.

    Raises:
        ValueError: the file is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing. Copy it again from where the model came from.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes. Copy it again.")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        slots = {name: _slot(path, _LENGTH_BYTES + length, entry) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt: its header cannot be read ({error!r}). Copy it again.") from error
    expected = max((slot.offset + slot.info.nbytes for slot in slots.values()), default=_LENGTH_BYTES + length)
    if size != expected:
        raise ValueError(f"{path} has {size} bytes where its header calls for {expected}: truncated? Copy it again.")
    return slots


def _slot(path: Path, data_start: int, entry: Mapping[str, object]) -> TensorSlot:
    begin, end = entry["data_offsets"]
    info = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != info.nbytes or begin < 0:
        raise ValueError(f"{info} does not take bytes {begin} to {end}")
    return TensorSlot(path, data_start + begin, info)


def encode_header(tensors: Mapping[str, TensorInfo], num_bytes: int | None = None) -> bytes:
    """The beginning of a file that holds the tensors one after the other.

    Args:
        num_bytes: its length, which must suffice; None: no longer than needed.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        end = position + info.nbytes
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    needed = _LENGTH_BYTES + len(text)
    total = -(-needed // _ALIGNMENT) * _ALIGNMENT if num_bytes is None else num_bytes
    assert needed <= total and total % _ALIGNMENT == 0
    return (total - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + text.ljust(total - _LENGTH_BYTES)


def _move(call: Callable[..., int], descriptor: int, rows: Tensor, offset: int, path: Path) -> None:
    """Reads or writes all of `rows` (bytes) at `offset`."""
    view = memoryview(rows.numpy())
    done = 0
    while done < len(view):
        try:
            moved = call(descriptor, [view[done : done + _IO_BYTES]], offset + done)
        except OSError as error:  # knows no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        if moved == 0:
            raise ValueError(f"{path} ends at byte {offset + done}, before its tensors do. Copy it again.")
        done += moved
