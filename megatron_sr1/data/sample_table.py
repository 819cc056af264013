"""The indices of many shards as columns: sample i of a dataset, without a Python object per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sr1.data.index import IndexedSample

UNKNOWN = -1


@dataclass(frozen=True)
class SampleTable:
    """Samples i = 0 ... n - 1 in the order of their shards; sample i owns the members first[i] ... first[i + 1]."""

    keys: tuple[str, ...]
    shard_of: np.ndarray  # [n] int32
    first: np.ndarray  # [n + 1] int64
    offsets: np.ndarray  # [members] int64, of the data in the shard, bytes
    sizes: np.ndarray  # [members] int64, bytes
    kinds: tuple[str, ...]  # the distinct extensions
    kind_codes: np.ndarray  # [members] int32, into kinds
    widths: np.ndarray  # [members] int32 pixels; UNKNOWN also where the member is no image
    heights: np.ndarray  # [members] int32
    text_tokens: np.ndarray  # [n] int32
    checksums: tuple[str, ...]

    @property
    def num_images(self) -> np.ndarray:
        """[n] int64: the last member of each sample is its json."""
        return np.diff(self.first) - 1

    def sample(self, i: int) -> IndexedSample:
        """Sample `i` as the index of its shard has it."""
        span = slice(self.first[i], self.first[i + 1])
        extensions = tuple(self.kinds[code] for code in self.kind_codes[span])
        count = len(extensions) - 1
        sizes = tuple(zip(self.widths[span][:count].tolist(), self.heights[span][:count].tolist(), strict=True))
        tokens = int(self.text_tokens[i])
        return IndexedSample(
            self.keys[i],
            extensions,
            tuple(self.offsets[span].tolist()),
            tuple(self.sizes[span].tolist()),
            None if any(UNKNOWN in size for size in sizes) else sizes,
            None if tokens == UNKNOWN else tokens,
            self.checksums[i],
        )


class TableBuilder:
    """Takes shards one after the other."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._checksums: list[str] = []
        self._kinds: dict[str, int] = {}
        self._rows: list[np.ndarray] = []  # per shard [samples, 3]: shard, members, text tokens
        self._members: list[np.ndarray] = []  # per shard [members, 5]: offset, size, kind, width, height

    def add(self, shard: int, samples: Sequence[IndexedSample]) -> None:
        """Appends the samples of shard number `shard`."""
        rows, members = [], []
        for sample in samples:
            tokens = UNKNOWN if sample.text_tokens is None else sample.text_tokens
            rows.append((shard, len(sample.sizes), tokens))
            # the image sizes stand with the first members, in their own order; the last member has none
            images = sample.image_sizes
            pixels = [(UNKNOWN, UNKNOWN)] * (len(sample.sizes) - 1) if images is None else images
            for extension, offset, size, (width, height) in zip(
                sample.extensions, sample.offsets, sample.sizes, (*pixels, (UNKNOWN, UNKNOWN)), strict=True
            ):
                kind = self._kinds.setdefault(extension, len(self._kinds))
                members.append((offset, size, kind, width, height))
            self._keys.append(sample.key)
            self._checksums.append(sample.checksum)
        self._rows.append(np.array(rows, dtype=np.int64).reshape(-1, 3))
        self._members.append(np.array(members, dtype=np.int64).reshape(-1, 5))

    def build(self) -> SampleTable:
        """The table of all that was added."""
        rows = np.concatenate([np.empty((0, 3), dtype=np.int64), *self._rows])
        members = np.concatenate([np.empty((0, 5), dtype=np.int64), *self._members])
        offsets, sizes, kinds, widths, heights = (np.ascontiguousarray(column) for column in members.T)
        return SampleTable(
            keys=tuple(self._keys),
            shard_of=rows[:, 0].astype(np.int32),
            first=np.concatenate([[0], np.cumsum(rows[:, 1])]),
            offsets=offsets,
            sizes=sizes,
            kinds=tuple(self._kinds),
            kind_codes=kinds.astype(np.int32),
            widths=widths.astype(np.int32),
            heights=heights.astype(np.int32),
            text_tokens=rows[:, 2].astype(np.int32),
            checksums=tuple(self._checksums),
        )
