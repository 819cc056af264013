"""Reads any sample of some shards by its number. No torch and no pickle here."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_sr1.data.index import IndexedSample, ShardIndex, content_checksum
from megatron_sr1.data.loading import load_index
from megatron_sr1.data.quarantine import BadSample, LeftOut, Quarantine
from megatron_sr1.data.remote import ShardCache
from megatron_sr1.data.remote_errors import RemoteError
from megatron_sr1.data.sample_table import UNKNOWN, SampleTable, TableBuilder
from megatron_sr1.data.scan import repeated_key
from megatron_sr1.data.schema import JSON_EXTENSION, decode_sample, image_number, image_size, size_problem
from megatron_sr1.data.urls import is_url, shard_name, shown
from megatron_sr1.types import Prompt, SftSample

_URLS_AT_ONCE = 16
_RETRY_SECONDS = (1.0, 4.0, 16.0)  # between tries to read a shard that was there at the start


class ShardDataset:
    """Random access to the samples of some shards. Only columns are held in memory, no open file: safe to fork."""

    def __init__(
        self,
        shards: Sequence[str | Path],
        *,
        quarantine: Quarantine | None = None,
        cache: ShardCache | None = None,
        names: Sequence[str] | None = None,
        origins: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        """Reads the index beside each shard, or, where there is none, the tar headers of the shard.

        Args:
            quarantine: takes what breaks the schema; None: the first such thing is an error.
            cache: where the shards behind URLs go; needed if there are any.
            names: what the quarantine calls each shard, distinct in all that share it; None: `distinct_names` of these.
            origins: what shards were built of, and what to do where its keys repeat.

        Raises:
            ValueError: no samples; a shard that is missing; an index of another shard; and, beyond what the quarantine
                takes: a shard that is compressed, truncated or damaged; a member that is not a plain file of the
                schema or whose path leaves the archive; a sample without json, with gaps in the numbers of its images,
                or whose key occurs twice.
        """
        self._shards = tuple(str(shard) for shard in shards)
        self._names = tuple(distinct_names(self._shards) if names is None else names)
        self._cache = cache
        self._origins = origins or {}
        self._quarantine = quarantine or Quarantine(0)
        self.tokenizers: set[str] = set()  # that the indices name
        self._versions: list[str] = []  # of each shard, for the cache
        builder, fingerprints, shard_of_key = TableBuilder(), [], {}
        for number, (shard, (index, bad)) in enumerate(zip(self._shards, self._indices(), strict=True)):
            for sample in bad:
                self._quarantine.add(replace(sample, shard=self._names[number]))
            samples = [sample for sample in index.samples if self._is_new(sample.key, number, shard_of_key)]
            builder.add(number, samples)
            fingerprints.append((shard_name(shard), index.fingerprint))
            self.tokenizers.add(index.tokenizer)
            has_file = any(sample.checksum for sample in index.samples)
            self._versions.append(index.fingerprint if has_file else "")
        self._table: SampleTable = builder.build()
        if not len(self):
            raise ValueError(
                f"no samples in the shards {[shown(shard) for shard in self._shards]}. Give shards that hold some."
            )
        self.shard_fingerprints: tuple[tuple[str, str], ...] = tuple(fingerprints)

    def __len__(self) -> int:
        return len(self._table.keys)

    def read(self, i: int) -> Prompt | SftSample:
        """Reads and decodes sample `i`, and nothing else. Raises what `fetch` and `decode` do."""
        return self.decode(i, self.fetch(i))

    def fetch(self, i: int) -> dict[str, bytes]:
        """The bytes of each member of sample `i`, by extension, as the index knows them.

        Raises:
            IndexError: i is not in [0, len).
            ValueError: the shard has changed on disk.
            OSError: the shard cannot be opened any more.
        """
        sample = self.describe(i)
        members = self._members(i, sample)
        if sample.checksum and content_checksum(members) != sample.checksum:
            raise ValueError(
                f"{self.where(i)}: its bytes are not those that the index was built from. The shard was changed or "
                "damaged: restore it, or build the index again."
            )
        return members

    def decode(self, i: int, members: Mapping[str, bytes]) -> Prompt | SftSample:
        """Sample `i`, of what `fetch` returned.

        Raises:
            ValueError: the sample breaks the schema, or an image cannot be decoded.
        """
        kinds = sorted((kind for kind in members if kind != JSON_EXTENSION), key=_number)
        images = [members[kind] for kind in kinds]
        return decode_sample(self._table.keys[i], members[JSON_EXTENSION], images, self.where(i))

    def describe(self, i: int) -> IndexedSample:
        """What the index says of sample `i`, without reading the shard.

        Raises:
            IndexError: i is not in [0, len).
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}: it must be 0 ... {len(self) - 1}")
        return self._table.sample(i)

    def image_sizes(self, i: int) -> tuple[tuple[int, int], ...]:
        """Width and height of the images of sample `i`; from the index, else from the images' headers.

        Raises:
            ValueError: an image's header cannot be read.
        """
        sample = self.describe(i)
        if sample.image_sizes is not None:
            return sample.image_sizes
        members = self._members(i, sample)
        kinds = sorted((kind for kind in members if kind != JSON_EXTENSION), key=_number)
        return tuple(image_size(members[kind], f"{self.where(i)}, image {n}") for n, kind in enumerate(kinds))

    def where(self, i: int) -> str:
        """Shard and key of sample `i`, for messages."""
        return f"{shown(self._shards[self._table.shard_of[i]])}, sample {self._table.keys[i]!r}"

    def bad(self, i: int, error: ValueError) -> BadSample:
        """The quarantine's entry for sample `i`."""
        return BadSample(*self.place(i), str(error), counts=not isinstance(error, LeftOut))

    def place(self, i: int) -> tuple[str, str]:
        """The quarantine's name of the shard of sample `i`, and its key."""
        return self._names[self._table.shard_of[i]], self._table.keys[i]

    @property
    def names(self) -> tuple[str, ...]:
        """What the quarantine calls each shard."""
        return self._names

    def check_images(self, max_images: int, key: str, numbers: Sequence[int] | np.ndarray) -> None:
        """Asks the index, before an engine starts.

        Args:
            key: of the configuration, for the message.
            numbers: the samples that will be used.

        Raises:
            ValueError: one has more than `max_images` images; the message names the one with the most.
        """
        counts = self._table.num_images[numbers]
        if len(counts) and counts.max() > max_images:
            most = int(counts.max())
            raise ValueError(
                f"{key}: {int((counts > max_images).sum())} of {len(counts)} samples have more than "
                f"rollout.max_images={max_images} images, {self.where(int(numbers[int(counts.argmax())]))} has {most}. "
                f"Set rollout.max_images={most}."
            )

    @property
    def has_lengths(self) -> bool:
        """Whether the index has the length of every prompt."""
        return bool((self._table.text_tokens != UNKNOWN).all())

    @property
    def shard_of(self) -> np.ndarray:
        """The number of each sample's shard: [samples] int32, ascending."""
        return self._table.shard_of

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, over the shards' names and fingerprints, in reading order (see `ShardIndex.fingerprint`)."""
        digest = hashlib.sha256()
        for name, fingerprint in self.shard_fingerprints:
            digest.update(f"{name}\0{fingerprint}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _indices(self) -> Iterator[tuple[ShardIndex, list[BadSample]]]:
        """In the order of the shards; URLs answer slowly, so several are asked at once."""
        if not any(map(is_url, self._shards)):
            yield from (load_index(shard, self._cache) for shard in self._shards)
            return
        with ThreadPoolExecutor(_URLS_AT_ONCE) as pool:
            yield from pool.map(load_index, self._shards, itertools.repeat(self._cache))

    def _is_new(self, key: str, number: int, shard_of_key: dict[str, str]) -> bool:
        """Notes a key of a shard; one that was there is quarantined."""
        shard = self._shards[number]
        if key not in shard_of_key:
            shard_of_key[key] = shard
            return True
        (here, advice), (first, _) = (
            self._origins.get(place, (shown(place), "")) for place in (shard, shard_of_key[key])
        )
        reason = f"{repeated_key(here, key, first)} {advice}".rstrip()
        self._quarantine.add(BadSample(self._names[number], key, reason))
        return False

    def _members(self, i: int, sample: IndexedSample) -> dict[str, bytes]:
        """The bytes of each member, by extension; tried again where the disk does not answer."""
        for seconds in (*_RETRY_SECONDS, None):
            try:
                return self._read(i, sample)
            except RemoteError:
                raise  # it was tried again
            except OSError as error:
                said, shard = error.strerror or str(error), shown(self._shards[self._table.shard_of[i]])
                if seconds is None:
                    raise OSError(
                        f"{shard}: the shard cannot be read any more ({said}), tried {len(_RETRY_SECONDS) + 1} times "
                        f"in {sum(_RETRY_SECONDS):g} s. Restore it; the same command goes on from the last checkpoint."
                    ) from error
                warnings.warn(f"{shard}: {said}; trying again in {seconds:g} s", stacklevel=2)
                time.sleep(seconds)
        raise AssertionError("the last try returns or raises")

    def _read(self, i: int, sample: IndexedSample) -> dict[str, bytes]:
        members = {}
        number = self._table.shard_of[i]
        path = self._shards[number]
        if self._cache is not None and is_url(path):
            path = self._cache.fetch(path, self._versions[number])
        with open(path, "rb", buffering=0) as file:
            for extension, offset, size in zip(sample.extensions, sample.offsets, sample.sizes, strict=True):
                problem = size_problem(extension, size)
                if problem:
                    raise ValueError(f"{self.where(i)}: {problem}")
                members[extension] = os.pread(file.fileno(), size, offset)
                if len(members[extension]) != size:
                    raise ValueError(f"{self.where(i)}: the file is shorter than its index says. Restore the shard.")
        return members


def distinct_names(shards: Sequence[str]) -> list[str]:
    """A name for each shard: that of its file, with its place among equals before it, which no name of a file has."""
    files = [shard_name(shard) for shard in shards]
    equals, seen = Counter(files), Counter[str]()
    names = []
    for file in files:
        names.append(f"{seen[file]}/{file}" if equals[file] > 1 else file)
        seen[file] += 1
    return names


def _number(extension: str) -> int:
    number = image_number(extension)
    assert number is not None, extension
    return number
