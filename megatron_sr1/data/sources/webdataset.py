"""Tars that already follow WebDataset: key.json beside key.jpg, or key.0.jpg, key.1.png ..."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from megatron_sr1.data.schema import JSON_EXTENSION
from megatron_sr1.data.sources.files import find_files
from megatron_sr1.data.sources.source import IMAGE_COLUMNS, KEY_COLUMN, Chunk, Columns, Problem, RawSample

BYTES_PER_CHUNK = 32 * 2**20
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # up to the first dot of the last part
_IMAGE = re.compile(r"(?:(\d+)\.)?(?:png|jpe?g|webp|gif|bmp|tiff?|ppm)", re.IGNORECASE | re.ASCII)
_END_OF_ARCHIVE = bytes(tarfile.BLOCKSIZE)
Member = tuple[str, str, tarfile.TarInfo]  # key, extension, header


@dataclass(frozen=True)
class WebDatasetSource:
    """A chunk is some neighbouring samples of one tar. Keys are kept."""

    path: str
    columns: Columns

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Raises ValueError as `find_files`."""
        return find_files(self.path, (".tar",))

    def chunks(self) -> Iterator[Chunk]:
        """Reads headers only. Raises ValueError where a tar is compressed, truncated or damaged."""
        for path in self.files:
            start = first_row = row = 0
            key: str | None = None
            for found, _, member in _members(path, 0):
                if found == key:
                    continue
                if member.offset - start >= BYTES_PER_CHUNK:
                    yield Chunk(path, start, first_row, row - first_row)
                    start, first_row = member.offset, row
                key, row = found, row + 1
            if row > first_row:
                yield Chunk(path, start, first_row, row - first_row)

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]:
        """Raises ValueError as `chunks`."""
        row = chunk.first_row
        key, members = "", dict[str, tarfile.TarInfo]()
        with open(chunk.file, "rb") as file:
            for found, extension, member in _members(chunk.file, chunk.start):
                if found != key and members:
                    yield self._sample(chunk.file, key, members, file)
                    row, members = row + 1, {}
                    if row == chunk.first_row + chunk.num_rows:
                        return
                key = found
                members[extension] = member
            if members:
                yield self._sample(chunk.file, key, members, file)

    def _sample(self, path: Path, key: str, members: dict[str, tarfile.TarInfo], file: BinaryIO) -> RawSample | Problem:
        where = f"{path}, sample {key!r}"
        wrong = next((name for name, member in members.items() if not _is_known(name, member)), None)
        if wrong is not None:
            return Problem(
                where, key, "unreadable_sample", f"the member .{wrong} is neither its json nor an image file"
            )
        if JSON_EXTENSION not in members:
            return Problem(where, key, "unreadable_sample", "it has no json member")
        data = {name: _data(file, member) for name, member in members.items()}
        try:
            values = json.loads(data.pop(JSON_EXTENSION))
        except ValueError as error:  # also UnicodeDecodeError
            return Problem(where, key, "unreadable_sample", f"its json member is not JSON: {error}")
        if not isinstance(values, dict):
            return Problem(where, key, "unreadable_sample", f"its json holds a {type(values).__name__}, not an object")
        images = [data[name] for name in sorted(data, key=_image_number)]
        numbers = [_image_number(name) for name in sorted(data, key=_image_number)]
        if numbers != list(range(len(numbers))):
            return Problem(where, key, "unreadable_sample", f"its images have the numbers {numbers}, not 0, 1, 2 ...")
        row = {name: value for name, value in values.items() if name not in (*IMAGE_COLUMNS, KEY_COLUMN)}
        return self.columns.sample({**row, IMAGE_COLUMNS[0]: images}, key, where, _as_bytes)


def _members(path: Path, start: int) -> Iterator[Member]:
    """Members with a key from byte `start`, where a header begins; then checks that the archive has its end."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it would keep every header
                    match = _KEY.fullmatch(member.name.removeprefix("./"))
                    if match is not None and not member.isdir():  # WebDataset passes over the others too
                        yield match[1], match[2], member
                end = archive.offset
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != _END_OF_ARCHIVE:  # tarfile takes a damaged header for the end
                raise ValueError(f"{path}: it ends without its end mark after byte {end}: it is truncated or damaged.")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{path}: cannot be read as an uncompressed tar ({error}). It is compressed, truncated or damaged."
        ) from error


def _is_known(extension: str, member: tarfile.TarInfo) -> bool:
    return (
        member.isreg() and not member.issparse() and (extension == JSON_EXTENSION or bool(_IMAGE.fullmatch(extension)))
    )


def _image_number(extension: str) -> int:
    """jpg -> 0, 3.png -> 3."""
    match = _IMAGE.fullmatch(extension)
    assert match is not None
    return int(match[1] or 0)


def _data(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _as_bytes(image: object) -> bytes:
    assert isinstance(image, bytes)
    return image
