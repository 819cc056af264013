"""The index file beside a shard: all that planning needs to know of its samples, read without opening the shard.

Beside `train-00000.tar` lies `train-00000.tar.index.json`, two lines of JSON in UTF-8. The first is an object:

    version       1
    shard         name of the shard, without folder
    num_bytes     of the shard
    tokenizer     what `text_tokens` were counted with, for people; "" where they are not known
    fingerprint   `ShardIndex.fingerprint`
    sha256        of the bytes of the second line

and the second an object of columns, every column a list with one entry per sample, in the order of the shard:

    key           members of a sample are <key>.<extension>
    extensions    of its members, in their order: ["json", "0.png"]
    offsets       of each member's data in the shard, bytes
    sizes         of each member's data, bytes
    image_sizes   [[width, height], ...] in the order of the image numbers; null: not known
    text_tokens   ids of its rendered prompt before images are expanded, each image counts 1; null: not known
    checksum      `content_checksum` of its members; "": not known

A dataset's fingerprint is that of its shards' names and fingerprints, so an index never speaks of another shard, and
shards are built, checked and replaced one by one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sr1.data.schema import JSON_EXTENSION, image_number

INDEX_SUFFIX = ".index.json"
VERSION = 1


@dataclass(frozen=True)
class IndexedSample:
    """One sample of a shard; see the top of the file."""

    key: str
    extensions: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    image_sizes: tuple[tuple[int, int], ...] | None = None
    text_tokens: int | None = None
    checksum: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one shard."""

    num_bytes: int
    samples: tuple[IndexedSample, ...]
    tokenizer: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, over every sample's key, and its members' extensions, sizes and checksum, in order.

        Where checksums are known two shards agree in it exactly if their samples do, byte for byte; without them it
        speaks of names and sizes only.
        """
        digest = hashlib.sha256()
        for sample in self.samples:
            members = [f"{kind}\0{size}" for kind, size in zip(sample.extensions, sample.sizes, strict=True)]
            text = "\0".join([sample.key, *members, sample.checksum]) + "\n"
            digest.update(text.encode(errors="surrogateescape"))
        return digest.hexdigest()


def content_checksum(members: Mapping[str, bytes]) -> str:
    """sha256, in hex, of a sample's members {extension: data} without its key: equal for samples of equal content."""
    digest = hashlib.sha256()
    for extension in sorted(members):
        digest.update(f"{extension}\0{len(members[extension])}\0".encode(errors="surrogateescape"))
        digest.update(members[extension])
    return digest.hexdigest()


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name + INDEX_SUFFIX)


def write_index(shard: Path, index: ShardIndex) -> Path:
    """Writes the index of `shard` beside it, whole or not at all."""
    columns = {f.name: [getattr(sample, f.name) for sample in index.samples] for f in fields(IndexedSample)}
    second = json.dumps(columns, separators=(",", ":")).encode()
    first = {
        "version": VERSION,
        "shard": shard.name,
        "num_bytes": index.num_bytes,
        "tokenizer": index.tokenizer,
        "fingerprint": index.fingerprint,
        "sha256": hashlib.sha256(second).hexdigest(),
    }
    path = index_path(shard)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(json.dumps(first).encode() + b"\n" + second + b"\n")
    os.replace(temporary, path)
    return path


def read_index(path: Path) -> ShardIndex:
    """Reads an index file.

    Raises:
        ValueError: it is missing or damaged, or of a version that this release does not read.
    """
    try:
        return parse_index(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path}: the index cannot be read ({error}). Build it again.") from error


def parse_index(data: bytes, where: str) -> ShardIndex:
    """The index from the bytes of its file; `where` names it in messages.

    Raises:
        ValueError: as `read_index`.
    """
    try:
        first, second = data.splitlines()
        tree = json.loads(first)
        if tree["version"] != VERSION:
            raise ValueError(f"its version is {tree['version']!r}, and this release reads {VERSION}")
        if hashlib.sha256(second).hexdigest() != tree["sha256"]:
            raise ValueError("its sha256 is not that of its second line")
        index = ShardIndex(int(tree["num_bytes"]), tuple(_samples(json.loads(second))), str(tree["tokenizer"]))
        for sample in index.samples:
            _check(sample, index.num_bytes)
        if index.fingerprint != tree["fingerprint"]:
            raise ValueError("its fingerprint is not that of its samples")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: the index is damaged or of another kind ({error!r}). Build it again.") from error
    return index


def _samples(columns: Mapping[str, Sequence[Any]]) -> list[IndexedSample]:
    rows = zip(*(columns[f.name] for f in fields(IndexedSample)), strict=True)
    return [
        IndexedSample(
            key,
            tuple(extensions),
            tuple(offsets),
            tuple(sizes),
            None if images is None else tuple((width, height) for width, height in images),
            tokens,
            checksum,
        )
        for key, extensions, offsets, sizes, images, tokens, checksum in rows
    ]


def _check(sample: IndexedSample, num_bytes: int) -> None:
    """Raises ValueError for what the reader could not rely on."""
    numbers = sorted(number for number in map(image_number, sample.extensions) if number is not None)
    if (
        numbers != list(range(len(numbers)))
        or sample.extensions.count(JSON_EXTENSION) != 1
        or len(sample.extensions) != len(numbers) + 1
        or not len(sample.extensions) == len(sample.offsets) == len(sample.sizes)
        or (sample.image_sizes is not None and len(sample.image_sizes) != len(numbers))
    ):
        raise ValueError(f"sample {sample.key!r} does not have one json member and images numbered 0, 1, 2 ...")
    for offset, size in zip(sample.offsets, sample.sizes, strict=True):
        if not 0 <= offset <= offset + size <= num_bytes:
            raise ValueError(f"sample {sample.key!r} reaches beyond the shard's {num_bytes} bytes")
