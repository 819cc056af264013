"""The files of rows that a configuration names: whether they are still the same, and how they are read.

A file is told by its place, size and time (behind a URL by what the server calls its version); of the rows' images that
are files of their own, which a table only names, size and time are noted when shards are built of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sr1.data.entries import Rows
from megatron_sr1.data.file_systems import download, file_of
from megatron_sr1.data.sources.columns import Columns
from megatron_sr1.data.sources.json_files import JsonSource
from megatron_sr1.data.sources.json_lines import JsonlSource
from megatron_sr1.data.sources.parquet import ParquetSource, may_name_files
from megatron_sr1.data.sources.source import IMAGE_COLUMNS, Problem, RawSample, RowReader
from megatron_sr1.data.urls import same_file, shard_name, shown

RowSource = ParquetSource | JsonlSource | JsonSource
Stamp = list[Any]  # [place, size in bytes, time in ns or version], as JSON has it
_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS stands in for
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "ZIP",
}
_FIXED_TIME = (0, 0)  # of a downloaded file: a build that was killed goes on with a copy that came again


def stamps_of(rows: Rows) -> list[Stamp]:
    """What tells a file from another one, or from itself after a change, of each file.

    Raises:
        ValueError: a file is not there, is empty, or is the pointer of Git LFS; a server that tells no version.
        RemoteError: a URL cannot be read.
    """
    return [_of_url(path) if rows.is_remote else _of_file(path) for path in rows.paths]


def _of_url(url: str) -> Stamp:
    found = file_of(url)
    if not found.version or found.size is None:
        lacks = "what version of the file it has" if not found.version else "how many bytes the file has"
        raise ValueError(
            f"{shown(url)}: the server does not tell {lacks}, so that a change could not be seen. Download the file, "
            "and give its path."
        )
    _refuse_empty(shown(url), found.size)
    return [same_file(url), found.size, found.version]


def _of_file(path: str) -> Stamp:
    try:
        found = os.stat(path)
        with open(path, "rb") as file:
            beginning = file.read(len(_POINTER))
    except FileNotFoundError:
        raise ValueError(f"{path}: the file is not there. Restore it.") from None
    _refuse_empty(path, found.st_size)
    if beginning == _POINTER:
        raise ValueError(f"{path}: it only points to the file, which Git LFS keeps. Get it: git lfs pull.")
    packed = next((name for start, name in _PACKED.items() if beginning.startswith(start)), None)
    if packed is not None:
        raise ValueError(f"{path}: it is compressed ({packed}), whatever its name says. Unpack it.")
    return [path, found.st_size, found.st_mtime_ns]


def _refuse_empty(name: str, num_bytes: int) -> None:
    if not num_bytes:
        raise ValueError(f"{name}: the file is empty. Write its rows, or leave it out.")


def local_files(rows: Rows, folder: Path) -> tuple[Path, ...]:
    """The files; those behind URLs are downloaded into `folder`, each into a folder of its own, under their names.

    Raises:
        RemoteError: a download failed.
    """
    if not rows.is_remote:
        return tuple(map(Path, rows.paths))
    files = []
    for number, url in enumerate(rows.paths):
        path = folder / f"{number:05d}" / shard_name(url)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            download(url, partial)
            os.utime(partial, ns=_FIXED_TIME)
            os.replace(partial, path)
        files.append(path)
    return tuple(files)


def source_of(rows: Rows, files: tuple[Path, ...], columns: RowReader, prefix: str = "") -> RowSource:
    """The reader of tools/build_shards.py for just these files."""
    if rows.format == "parquet":
        return ParquetSource(rows.folder or str(files[0]), columns, files, prefix)
    kind = JsonlSource if rows.format == "jsonl" else JsonSource
    return kind(rows.pattern, columns, None, files, prefix)


def named_columns(rows: Rows, files: tuple[Path, ...], names: Collection[str]) -> set[str]:
    """Those of `names` that are columns of the files. Raises ValueError where one is damaged."""
    return source_of(rows, files, Columns()).named(names)


@dataclass
class _Noting:
    """Reads rows as `columns` does, and notes the images that are named by path; none is opened."""

    columns: Columns
    paths: set[str] = field(default_factory=set)

    @property
    def asked_for(self) -> Collection[str]:
        return ()

    def check(self, names: Sequence[str], file: Path) -> None:
        self.columns.check(names, file)

    def sample(
        self, row: Mapping[str, Any], key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        return self.columns.sample(row, key, where, self._note)

    def _note(self, image: object) -> bytes:
        match image:
            case {"bytes": bytes()}:
                pass
            case (str() as path) | {"path": str() as path}:
                self.paths.add(path)
        return b""


def image_stamps(rows: Rows, files: tuple[Path, ...], columns: Columns) -> list[Stamp]:
    """Of all image files that the rows name, in the order of their paths; size and time are -1 where there is none.

    Raises:
        ValueError: a file of rows is damaged.
    """
    images = {name for name, to in columns.rename.items() if to in IMAGE_COLUMNS} | {*IMAGE_COLUMNS}
    if rows.format == "parquet" and not any(may_name_files(file, images) for file in files):
        return []
    noting = _Noting(columns)
    source = source_of(rows, files, noting)
    found: set[str] = set()
    for chunk in source.chunks():
        folder = rows.folder if rows.format == "parquet" and rows.folder else str(chunk.file.parent)
        noting.paths.clear()
        for _ in source.read(chunk):
            pass
        found |= {os.path.normpath(os.path.join(folder, path)) for path in noting.paths}
    return stamps_now(sorted(found))


def stamps_now(paths: Iterable[str]) -> list[Stamp]:
    """As `image_stamps`, of these files."""
    return [_stamp_now(path) for path in paths]


def _stamp_now(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return [path, -1, -1]
    return [path, found.st_size, found.st_mtime_ns]
