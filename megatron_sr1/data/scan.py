"""Makes the index of a shard from the shard itself, by one pass over its tar headers (see `tar_groups`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_sr1.data.index import IndexedSample, ShardIndex, content_checksum
from megatron_sr1.data.quarantine import BadSample
from megatron_sr1.data.schema import JSON_EXTENSION, image_number, image_size, size_problem
from megatron_sr1.data.tar_groups import TarGroup, read_groups


def scan_shard(path: Path, contents: bool = False) -> tuple[ShardIndex, list[BadSample]]:
    """Reads the headers of a shard; what breaks the schema is left out of the index and named.

    Args:
        contents: read the data too, for checksums and image sizes. `text_tokens` are left unknown.

    Raises:
        ValueError: there is no such file.
    """
    samples: dict[str, IndexedSample] = {}
    bad: list[BadSample] = []
    found = read_groups(path)
    if not path.is_file():
        raise ValueError(found.damage)
    seen: set[str] = set()
    for group in found.groups:
        problem = group.problem
        if not problem and group.key in seen:
            problem = repeated_key(str(path), group.key, str(path))
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
    if found.damage:
        bad.append(BadSample(path.name, found.damaged_key, found.damage))
    return ShardIndex(path.stat().st_size, tuple(samples.values())), bad


def repeated_key(path: str, key: str, first: str) -> str:
    """The message for a key that occurs in two places."""
    return (
        f"{path}: the key {key!r} occurs again; it is already in {first}. Keys must be unique in all shards of a "
        "dataset."
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


def _extension_problem(path: Path, key: str, extension: str) -> str:
    if extension == JSON_EXTENSION or image_number(extension) is not None:
        return ""
    return (
        f"{path}, member '{key}.{extension}': it is neither <key>.json nor an image <key>.<number>.png (jpg, jpeg, "
        "webp). Rename it or leave it out."
    )


def _schema_problem(path: Path, group: TarGroup) -> str:
    """Every sample has one json, and images numbered 0, 1, 2 ... without gap or repetition."""
    extensions = [member.extension for member in group.members]
    strange = next((text for text in (_extension_problem(path, group.key, name) for name in extensions) if text), "")
    if strange:
        return strange
    if extensions.count(JSON_EXTENSION) != 1:
        return f"{path}, sample {group.key!r}: it has {extensions.count(JSON_EXTENSION)} json members, not one."
    large = next((text for text in (size_problem(m.extension, m.size) for m in group.members) if text), "")
    if large:
        return f"{path}, sample {group.key!r}: {large}"
    numbers = sorted(number for number in map(image_number, extensions) if number is not None)
    if numbers != list(range(len(numbers))):
        return (
            f"{path}, sample {group.key!r}: it has {len(numbers)} images with the numbers {numbers}; they must be "
            "0, 1, 2 ... without a gap. Rename or restore the missing image."
        )
    return ""
