"""The index of some tar shards: which sample owns which bytes, found by one pass over the headers.

Grouping follows WebDataset: a key is a member's path up to the first dot of its last part, and the members of a sample
stand next to each other.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_sr1.data.schema import JSON_EXTENSION, image_number

_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)


@dataclass
class ShardIndex:
    """Members of all shards, in order; sample i owns the members first[i] ... first[i + 1]."""

    keys: list[str] = field(default_factory=list)
    shards: list[int] = field(default_factory=list)  # shard of sample i
    first: list[int] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)  # of each member
    offsets: list[int] = field(default_factory=list)  # of each member's data in its shard, bytes
    sizes: list[int] = field(default_factory=list)  # bytes


def build_index(paths: Sequence[Path]) -> ShardIndex:
    """Raises ValueError for everything that `ShardDataset` lists."""
    index = ShardIndex()
    shard_of_key: dict[str, Path] = {}
    for shard, path in enumerate(paths):
        start = len(index.keys)
        for key, extension, member in _members(path):
            if len(index.keys) == start or index.keys[-1] != key:
                if key in shard_of_key:
                    raise ValueError(
                        f"{path}: the key {key!r} occurs again; it is already in {shard_of_key[key]}. "
                        "Keys must be unique in all shards of a dataset, and the members of a sample must stand next "
                        "to each other."
                    )
                shard_of_key[key] = path
                index.keys.append(key)
                index.shards.append(shard)
                index.first.append(len(index.sizes))
            index.extensions.append(extension)
            index.offsets.append(member.offset_data)
            index.sizes.append(member.size)
    _check_samples(index, paths)
    return index


def _check_samples(index: ShardIndex, paths: Sequence[Path]) -> None:
    """Every sample has one json, and images numbered 0, 1, 2 ... without gap or repetition."""
    borders = [*index.first, len(index.extensions)]
    for key, shard, (first, end) in zip(index.keys, index.shards, itertools.pairwise(borders), strict=True):
        path, extensions = paths[shard], index.extensions[first:end]
        if extensions.count(JSON_EXTENSION) != 1:
            raise ValueError(
                f"{path}, sample {key!r}: it has {extensions.count(JSON_EXTENSION)} json members, not one."
            )
        numbers = sorted(number for number in map(image_number, extensions) if number is not None)
        if numbers != list(range(len(numbers))):
            raise ValueError(
                f"{path}, sample {key!r}: it has {len(numbers)} images with the numbers {numbers}; they must be "
                "0, 1, 2 ... without a gap. Rename or restore the missing image."
            )


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yields (key, extension, member) of every plain file with a key; then checks that the archive is complete."""
    try:
        with tarfile.open(path, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # or tarfile would keep every header
                if member.isdir():
                    continue
                name = _safe_name(path, member)
                match = _MEMBER_NAME.fullmatch(name)
                if match is None:  # WebDataset passes over names without a key too: ".hidden", "README"
                    continue
                if match[2] != JSON_EXTENSION and image_number(match[2]) is None:
                    raise ValueError(
                        f"{path}, member {name!r}: it is neither <key>.json nor an image <key>.<number>.png (jpg, "
                        "jpeg, webp). Rename it or leave it out."
                    )
                yield match[1], match[2], member
            _check_end(path, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as an uncompressed tar ({error}). It is missing, compressed, truncated or "
            "damaged: write it again."
        ) from error


def _safe_name(path: Path, member: tarfile.TarInfo) -> str:
    """The member's name without a leading "./"; nothing is ever extracted, but a key must not point anywhere either."""
    name = member.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(
            f"{path}, member {member.name!r}: an absolute path or '..' is not allowed. Write the shard again."
        )
    if not member.isreg() or member.issparse():
        raise ValueError(f"{path}, member {member.name!r}: it is not a plain file. Store files, not links, in a shard.")
    return name


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a cut or damaged header for the end; the real end is a block of zeros (POSIX ustar)."""
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != _END_OF_ARCHIVE:
            raise ValueError(
                f"{path}: the archive ends without its end mark after byte {offset}: it is truncated or damaged."
            )
