"""Makes the index of a shard from the shard itself, by one pass over its tar headers.

Grouping follows WebDataset: a key is a member's path up to the first dot of its last part, and the members of a sample
stand next to each other.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_sr1.data.index import IndexedSample, ShardIndex, content_checksum
from megatron_sr1.data.quarantine import BadSample
from megatron_sr1.data.schema import JSON_EXTENSION, image_number, image_size

_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
# what tarfile raises on damaged or hostile headers: numbers too large to seek to, endless chains of extended headers
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)
_END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)


@dataclass
class _Group:
    """Members of one key that stand next to each other."""

    key: str
    members: list[tuple[str, int, int]] = field(default_factory=list)  # extension, offset, size
    problem: str = ""  # the first one


def scan_shard(path: Path, contents: bool = False) -> tuple[ShardIndex, list[BadSample]]:
    """Reads the headers of a shard; what breaks the schema is left out of the index and named.

    Args:
        contents: read the data too, for checksums and image sizes. `text_tokens` are left unknown.

    Raises:
        ValueError: there is no such file.
    """
    samples: dict[str, IndexedSample] = {}
    bad: list[BadSample] = []
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error
    seen: set[str] = set()
    for group in _groups(path):
        problem = group.problem
        if not problem and group.key in seen:
            problem = repeated_key(str(path), group.key, str(path))
            samples.pop(group.key, None)  # it may lack the members that stand here
        problem = problem or _schema_problem(path, group)
        seen.add(group.key)
        if not problem:
            extensions, offsets, sizes = zip(*group.members, strict=True)
            sample = IndexedSample(group.key, extensions, offsets, sizes)
            try:
                samples[group.key] = _with_contents(path, sample) if contents else sample
            except ValueError as error:
                problem = str(error)
        if problem:
            bad.append(BadSample(path.name, group.key, problem))
    return ShardIndex(num_bytes, tuple(samples.values())), bad


def repeated_key(path: str, key: str, first: str) -> str:
    """The message for a key that occurs in two places."""
    return (
        f"{path}: the key {key!r} occurs again; it is already in {first}. Keys must be unique in all shards of a "
        "dataset, and the members of a sample must stand next to each other."
    )


def _with_contents(path: Path, sample: IndexedSample) -> IndexedSample:
    members = {}
    with open(path, "rb") as file:
        for extension, offset, size in zip(sample.extensions, sample.offsets, sample.sizes, strict=True):
            file.seek(offset)
            members[extension] = file.read(size)
    images = sorted((kind for kind in members if kind != JSON_EXTENSION), key=lambda kind: image_number(kind) or 0)
    where = f"{path}, sample {sample.key!r}"
    sizes = tuple(image_size(members[kind], f"{where}, image {number}") for number, kind in enumerate(images))
    return replace(sample, image_sizes=sizes, checksum=content_checksum(members))


def _groups(path: Path) -> Iterator[_Group]:
    """Every group of members; damage of the archive itself comes last, as a group with the key ""."""
    group = _Group("")
    try:
        for key, extension, member, problem in _members(path):
            if key != group.key:
                if group.members or group.problem:
                    yield group
                group = _Group(key)
            group.members.append((extension, member.offset_data, member.size))
            group.problem = group.problem or problem
    except _TAR_ERRORS as error:
        # the last group may lack members that were in the damaged part
        yield _Group(group.key, [], _unreadable(path, error))
        return
    if group.members:
        yield group


def _unreadable(path: Path, error: BaseException) -> str:
    return (
        f"{path}: cannot be read as an uncompressed tar ({error}). It is missing, compressed, truncated or damaged: "
        "write it again."
    )


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, str]]:
    """Yields (key, extension, member, what is wrong or "") of every file with a key.

    Raises:
        one of _TAR_ERRORS: the archive is damaged, or not complete.
    """
    with tarfile.open(path, mode="r:") as archive:
        last = -1
        while (member := archive.next()) is not None:
            archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it would keep every header
            if member.size < 0 or archive.offset <= last:  # tarfile would go round in a circle
                raise tarfile.ReadError(f"member {member.name!r} has {member.size} bytes")
            last = archive.offset
            if member.isdir():
                continue
            problem = _member_problem(path, member)
            name = member.name.removeprefix("./")
            match = _MEMBER_NAME.fullmatch(name)
            if match is not None:
                extension_problem = _extension_problem(path, name, match[2])
                yield match[1], match[2], member, problem or extension_problem
            elif problem:  # without a key, but not to be passed over
                yield name, "", member, problem
            # WebDataset passes over names without a key too: ".hidden", "README"
        _check_end(path, archive.offset)


def _member_problem(path: Path, member: tarfile.TarInfo) -> str:
    """Nothing is ever extracted, but a key must not point anywhere either."""
    name = member.name.removeprefix("./")
    if name.startswith("/") or ".." in name.split("/"):
        return f"{path}, member {member.name!r}: an absolute path or '..' is not allowed. Write the shard again."
    if not member.isreg() or member.issparse():
        return f"{path}, member {member.name!r}: it is not a plain file. Store files, not links, in a shard."
    return ""


def _extension_problem(path: Path, name: str, extension: str) -> str:
    if extension == JSON_EXTENSION or image_number(extension) is not None:
        return ""
    return (
        f"{path}, member {name!r}: it is neither <key>.json nor an image <key>.<number>.png (jpg, jpeg, webp). Rename "
        "it or leave it out."
    )


def _schema_problem(path: Path, group: _Group) -> str:
    """Every sample has one json, and images numbered 0, 1, 2 ... without gap or repetition."""
    extensions = [extension for extension, _, _ in group.members]
    if extensions.count(JSON_EXTENSION) != 1:
        return f"{path}, sample {group.key!r}: it has {extensions.count(JSON_EXTENSION)} json members, not one."
    numbers = sorted(number for number in map(image_number, extensions) if number is not None)
    if numbers != list(range(len(numbers))):
        return (
            f"{path}, sample {group.key!r}: it has {len(numbers)} images with the numbers {numbers}; they must be "
            "0, 1, 2 ... without a gap. Rename or restore the missing image."
        )
    return ""


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a cut or damaged header for the end; the real end is a block of zeros (POSIX ustar)."""
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != _END_OF_ARCHIVE:
            raise tarfile.ReadError(f"it ends without its end mark after byte {offset}")
