"""One shard, written sample by sample: a plain tar whose bytes depend on nothing but its samples."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

from megatron_sr1.data.build.samples import BuiltSample
from megatron_sr1.data.index import IndexedSample, ShardIndex, write_index
from megatron_sr1.data.writer import MTIME

MODE = 0o444
END = bytes(2 * tarfile.BLOCKSIZE)  # of an archive (POSIX ustar)


class ShardFile:
    """The shard that is being written. The file is complete only after `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._samples: list[IndexedSample] = []

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def num_bytes_with(self, blocks: tuple[bytes, ...]) -> int:
        """Bytes of the whole archive if it ended after these."""
        return self._num_bytes + sum(map(len, blocks)) + len(END)

    def add(self, sample: BuiltSample, blocks: tuple[bytes, ...]) -> None:
        """Appends a sample; `blocks` as `tar_blocks` makes them."""
        offsets = []
        for (_, data), block in zip(sample.members, blocks, strict=True):
            padded = len(data) + -len(data) % tarfile.BLOCKSIZE
            offsets.append(self._num_bytes + len(block) - padded)
            self._write(block)
        extensions, contents = zip(*sample.members, strict=True)
        self._samples.append(
            IndexedSample(
                sample.key,
                extensions,
                tuple(offsets),
                tuple(map(len, contents)),
                sample.image_sizes,
                sample.text_tokens,
                sample.checksum,
            )
        )

    def close(self, tokenizer: str) -> tuple[ShardIndex, str]:
        """Puts the shard on disk and its index beside it; returns the index and the sha256 of the shard, in hex."""
        self._write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = ShardIndex(self._num_bytes, tuple(self._samples), tokenizer)
        write_index(self.path, index)
        return index, self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._num_bytes += len(data)


def tar_blocks(sample: BuiltSample) -> tuple[bytes, ...]:
    """Per member: header (with a pax header where the name needs one), data and padding."""
    blocks = []
    for extension, data in sample.members:
        info = tarfile.TarInfo(f"{sample.key}.{extension}")
        info.size, info.mtime, info.mode = len(data), MTIME, MODE
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        blocks.append(header + data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return tuple(blocks)
