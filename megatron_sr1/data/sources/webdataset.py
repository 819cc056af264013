"""Tars that already follow WebDataset: key.json beside key.jpg, or key.0.jpg, key.1.png ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from megatron_sr1.data.json_values import load_json
from megatron_sr1.data.schema import JSON_EXTENSION, size_problem
from megatron_sr1.data.sources.columns import Columns
from megatron_sr1.data.sources.files import find_files
from megatron_sr1.data.sources.source import IMAGE_COLUMNS, KEY_COLUMN, Chunk, Problem, RawSample
from megatron_sr1.data.tar_groups import TarGroup, lonely_images, read_groups, torn_problem

BYTES_PER_CHUNK = 32 * 2**20
_HEADER_BYTES = 1024  # of a member: its header and, on average, its padding
_IMAGE = re.compile(r"(?:(\d+)\.)?(?:png|jpe?g|webp|gif|bmp|tiff?|ppm)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class WebDatasetSource:
    """A chunk is some samples of one tar, with the places of their members: headers are read once. Keys are kept."""

    path: str
    columns: Columns

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order. Raises ValueError as `find_files`."""
        return self._files

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        return find_files(self.path, (".tar",))

    def chunks(self) -> Iterator[Chunk]:
        """Reads headers only. Raises ValueError where a tar is compressed, truncated or damaged."""
        groups = {path: _whole(path) for path in self.files}
        lonely = lonely_images(group for found in groups.values() for group in found)
        for path, found in groups.items():
            for group in found:
                group.problem = group.problem or torn_problem(path, group, lonely)
            first = num_bytes = 0
            for row, group in enumerate(found):
                if num_bytes >= BYTES_PER_CHUNK:
                    yield Chunk(path, first, first, row - first, tuple(found[first:row]))
                    first, num_bytes = row, 0
                num_bytes += sum(member.size + _HEADER_BYTES for member in group.members)
            if found:
                yield Chunk(path, first, first, len(found) - first, tuple(found[first:]))

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]:
        """Raises OSError where the tar is gone."""
        with open(chunk.file, "rb") as file:
            for group in chunk.groups:
                yield self._sample(chunk.file, group, file)

    def _sample(self, path: Path, group: TarGroup, file: BinaryIO) -> RawSample | Problem:
        where = f"{path}, sample {group.key!r}"
        problem = group.problem or _schema_problem(group)
        if problem:
            return Problem(where, group.key, "unreadable_sample", problem)
        data = {member.extension: _data(file, member.offset, member.size) for member in group.members}
        try:
            values = load_json(data.pop(JSON_EXTENSION))
        except ValueError as error:
            reason = f"its json member is not JSON: {error}"
            return Problem(where, group.key, "unreadable_sample", reason)
        if not isinstance(values, dict):
            reason = f"its json holds a {type(values).__name__}, not an object"
            return Problem(where, group.key, "unreadable_sample", reason)
        images = [data[name] for name in _in_order(group.key, data, values)]
        named = _num_named(values)
        if named not in (0, len(images)):
            reason = f"its json names {named} images, and the tar holds {len(images)} of this key"
            return Problem(where, group.key, "unreadable_image", reason)
        row = {name: value for name, value in values.items() if name not in (*IMAGE_COLUMNS, KEY_COLUMN)}
        sample = self.columns.sample({**row, IMAGE_COLUMNS[0]: images}, group.key, where, _as_bytes)
        if isinstance(sample, Problem) or not group.dotted:
            return sample
        return replace(sample, changes=("key", *sample.changes))


def _whole(path: Path) -> list[TarGroup]:
    found = read_groups(path)
    if found.damage:
        raise ValueError(found.damage)
    return found.groups


def _has_json(group: TarGroup) -> bool:
    return any(member.extension == JSON_EXTENSION for member in group.members)


def _schema_problem(group: TarGroup) -> str:
    extensions = [member.extension for member in group.members]
    wrong = next((name for name in extensions if name != JSON_EXTENSION and not _IMAGE.fullmatch(name)), None)
    if wrong is not None:
        return (
            f"of its {len(extensions)} members {group.key}.{wrong} is neither its json nor an image file. Put what it "
            "says into the json, or leave it out of the tar; a key ends at the first dot."
        )
    large = next((text for text in (size_problem(m.extension, m.size) for m in group.members) if text), "")
    if large:
        return large
    if not _has_json(group):
        return f"it has no json member, but {len(extensions)} images; a key ends at the first dot"
    numbers = sorted(_image_number(name) for name in extensions if name != JSON_EXTENSION)
    return "" if numbers == list(range(len(numbers))) else f"its images have the numbers {numbers}, not 0, 1, 2 ..."


def _in_order(key: str, members: Iterable[str], values: dict[str, object]) -> list[str]:
    """The members by their numbers; in the order in which the json names all of them, where it does."""
    numbered = sorted(members, key=_image_number)
    files = {f"{key.rpartition('/')[2]}.{member}": member for member in numbered}
    for value in (values.get(column) for column in IMAGE_COLUMNS):
        names = [str(name).rpartition("/")[2] for name in value] if isinstance(value, list) else []
        if len(names) == len(files) and set(names) == files.keys():
            return [files[name] for name in names]
    return numbered


def _num_named(values: dict[str, object]) -> int:
    """How many images a json itself speaks of."""
    named = [values[name] for name in IMAGE_COLUMNS if values.get(name)]
    return max(
        (len(value) if isinstance(value, Sequence) and not isinstance(value, str) else 1 for value in named), default=0
    )


def _image_number(extension: str) -> int:
    """jpg -> 0, 3.png -> 3."""
    match = _IMAGE.fullmatch(extension)
    assert match is not None
    return int(match[1] or 0)


def _data(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _as_bytes(image: object) -> bytes:
    assert isinstance(image, bytes)
    return image
