"""Finds shards, and reads any of their samples by its number. No torch and no pickle here."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_sr1.data.index import build_index
from megatron_sr1.data.schema import JSON_EXTENSION, decode_sample, image_number
from megatron_sr1.types import Prompt, SftSample


def expand_shards(patterns: Sequence[str], key: str) -> list[Path]:
    """Expands paths and glob patterns, in the given order, each pattern's matches sorted, every file once.

    Args:
        key: the configuration key the patterns come from, for messages ("data.train").

    Raises:
        ValueError: no pattern, or one that matches no file.
    """
    if not patterns:
        raise ValueError(f"{key} is empty. Set {key} to a list of shards, for example [data/train-*.tar].")
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]
        if not matches:
            raise ValueError(
                f"{key}: {pattern!r} matches no file (looked from {os.getcwd()}). Correct the path or write the shards."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


class ShardDataset:
    """Random access to the samples of some shards. Only an index is held in memory, no open file: safe to fork."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Reads the tar headers of all shards.

        Raises:
            ValueError: no samples; a shard that is missing, compressed, truncated or damaged; a member that is not a
                plain file of the schema or whose path leaves the archive; a sample without json, with gaps in the
                numbers of its images, or whose key occurs twice.
        """
        self._paths = tuple(Path(path) for path in paths)
        index = build_index(self._paths)
        if not index.keys:
            raise ValueError(
                f"no samples in the shards {[str(path) for path in self._paths]}. Give shards that hold some."
            )
        self._keys = tuple(index.keys)
        self._shard_of = np.array(index.shards, dtype=np.int32)  # [samples]
        self._first = np.array([*index.first, len(index.sizes)], dtype=np.int64)  # [samples + 1]
        self._offsets = np.array(index.offsets, dtype=np.int64)  # [members]
        self._sizes = np.array(index.sizes, dtype=np.int64)  # [members]
        self._kinds, codes = np.unique(index.extensions, return_inverse=True)
        self._kind_codes = codes.astype(np.int32)  # [members], into _kinds

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, i: int) -> Prompt | SftSample:
        """Reads and decodes sample `i`, and nothing else.

        Raises:
            IndexError: i is not in [0, len).
            ValueError: the sample breaks the schema, an image cannot be decoded, the shard has changed on disk.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}: it must be 0 ... {len(self) - 1}")
        path, key = self._paths[self._shard_of[i]], self._keys[i]
        members = {}
        with open(path, "rb") as file:
            for member in range(self._first[i], self._first[i + 1]):
                file.seek(self._offsets[member])
                data = file.read(self._sizes[member])
                if len(data) != self._sizes[member]:
                    raise ValueError(
                        f"{path}, sample {key!r}: the file is shorter than when it was opened. Start again."
                    )
                members[str(self._kinds[self._kind_codes[member]])] = data
        text = members.pop(JSON_EXTENSION)
        images = [members[kind] for kind in sorted(members, key=image_number)]
        return decode_sample(key, text, images, where=f"{path}, sample {key!r}")

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, over each sample's shard name and, per member, name and size in bytes, in reading order.

        Two datasets that agree in it list the same samples in the same order; the data itself is not hashed.
        """
        digest = hashlib.sha256()
        for i, key in enumerate(self._keys):
            digest.update(f"{self._paths[self._shard_of[i]].name}\0".encode())
            for member in range(self._first[i], self._first[i + 1]):
                kind = self._kinds[self._kind_codes[member]]
                digest.update(f"{key}.{kind}\0{self._sizes[member]}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()
