"""The safetensors files of a Hugging Face folder, written without holding them in memory.

`PlannedShards` knows all tensors beforehand: pieces may come in any order and from several processes. `GrowingShards`
takes tensors as they come. `FileSizes` is how tensors become files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_sr1.weights.safetensors import TensorInfo, TensorSlot, encode_header

MAX_SHARD_BYTES = 5_000_000_000
_RESERVED_BYTES = 512 << 10  # for the header of a file whose tensors are not known yet: about 3000 of them
_ENTRY_BYTES = 160  # of a header entry beside the tensor's name


class FileSizes:
    """Tensors in their order, in files of at most so many bytes, or of one tensor that is larger."""

    def __init__(self, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self._max_bytes = max_bytes
        self._number, self._size, self._count = 0, 0, 0  # file, and bytes and tensors in it

    def place(self, num_bytes: int) -> int:
        """The number of the file of the next tensor."""
        if self._count and self._size + num_bytes > self._max_bytes:
            self._number, self._size, self._count = self._number + 1, 0, 0
        self._size += num_bytes
        self._count += 1
        return self._number


class PlannedShards:
    """Shards of known tensors. Every process makes the same plan; one calls `create`, then all may `write`."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        sizes = FileSizes(max_shard_bytes)
        groups: list[dict[str, TensorInfo]] = [{}]
        for name, info in tensors.items():
            if sizes.place(info.nbytes) == len(groups):
                groups.append({})
            groups[-1][name] = info
        self.folder = folder
        self.headers: dict[str, bytes] = {}
        self.slots: dict[str, TensorSlot] = {}
        self.file_bytes: dict[str, int] = {}
        self.written = dict.fromkeys(tensors, 0)  # bytes that this process has put there
        for number, group in enumerate(groups):
            file = _file_name(number, len(groups))
            self.headers[file] = encode_header(group)
            offset = len(self.headers[file])
            for name, info in group.items():
                self.slots[name] = TensorSlot(folder / file, offset, info)
                offset += info.nbytes
            self.file_bytes[file] = offset

    def create(self) -> None:
        """Makes the files, full length with headers and without values, and their index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.headers:
            self.create_file(file)
        self.write_index()

    def create_file(self, file: str) -> None:
        """One of them."""
        with (self.folder / file).open("wb") as stream:
            stream.write(self.headers[file])
            stream.truncate(self.file_bytes[file])

    def write_index(self) -> None:
        """Which file holds which tensor; of one file none is written."""
        files = {name: slot.file.name for name, slot in self.slots.items()}
        _write_index(self.folder, files, sum(slot.info.nbytes for slot in self.slots.values()))

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Puts rows [start, start + len(tensor)) into their place."""
        self.slots[name].write(tensor, start)
        self.written[name] += tensor.nbytes

    def sync(self) -> None:
        """Returns when what was written is on the disk."""
        for file in self.headers:
            sync_file(self.folder / file)


class GrowingShards:
    """Shards of tensors that are known only as they come."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.shards: list[dict[str, TensorInfo]] = []
        self.size = 0
        self.header_bytes = 0

    def append(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor behind the last one."""
        info = TensorInfo(tensor.dtype, tuple(tensor.shape))
        entry = len(json.dumps(name)) + _ENTRY_BYTES
        full = self.size + info.nbytes > self.max_shard_bytes or self.header_bytes + entry > _RESERVED_BYTES
        if not self.shards or full:
            self.shards.append({})
            self.size, self.header_bytes = 0, _ENTRY_BYTES
            self._path(len(self.shards) - 1).touch()
        slot = TensorSlot(self._path(len(self.shards) - 1), _RESERVED_BYTES + self.size, info)
        slot.write(tensor)
        self.shards[-1][name] = info
        self.size += info.nbytes
        self.header_bytes += entry

    def finish(self) -> None:
        """Writes the headers and the index, and gives the files their names."""
        files = {}
        for number, tensors in enumerate(self.shards):
            with self._path(number).open("r+b") as stream:
                stream.write(encode_header(tensors, _RESERVED_BYTES))
            sync_file(self._path(number))
            file = _file_name(number, len(self.shards))
            self._path(number).rename(self.folder / file)
            files |= dict.fromkeys(tensors, file)
        _write_index(self.folder, files, sum(info.nbytes for shard in self.shards for info in shard.values()))

    def _path(self, number: int) -> Path:
        return self.folder / f"shard_{number:05d}.growing"


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """A folder with one file needs none."""
    if len(set(files.values())) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sync_file(path: Path) -> None:
    """Returns when what was written to a file is on the disk."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
