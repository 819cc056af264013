"""JSON Lines: one object a line; images are paths below the image folder."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_sr1.config.data_suffixes import JSONL_SUFFIXES
from megatron_sr1.data.json_values import load_json
from megatron_sr1.data.sources.files import find_files, inside, key_prefixes
from megatron_sr1.data.sources.source import Chunk, Problem, RawSample, RowReader

LINES_PER_CHUNK = 64
_LOOKED_AT = 64  # bytes at the beginning of a file


@dataclass(frozen=True)
class JsonlSource:
    """`images`: the folder where paths begin; None: that of the file that names them. Blank lines are passed over.

    `chosen`: the files; none: those of `path`. `prefix`: of all keys that rows do not give.
    """

    path: str
    columns: RowReader
    images: str | None = None
    chosen: tuple[Path, ...] = ()
    prefix: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order. Raises ValueError as `find_files`."""
        return self._files

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        return self.chosen or find_files(self.path, JSONL_SUFFIXES)

    @cached_property
    def _prefixes(self) -> Mapping[Path, str]:
        return key_prefixes(self.files, self.prefix)

    def named(self, names: Collection[str]) -> set[str]:
        """Those that are written in any line, as JSON writes a name."""
        unseen = {name: _spellings(name) for name in names}
        for path in self.files if unseen else ():
            with open(path, "rb") as file:
                for line in file:
                    unseen = {name: words for name, words in unseen.items() if not any(map(line.__contains__, words))}
                    if not unseen:
                        break
        return set(names) - unseen.keys()

    def chunks(self) -> Iterator[Chunk]:
        """Line ends are all that is looked for, and the columns that the user names.

        Raises:
            ValueError: a file is none of lines of UTF-8, or no line has such a column.
        """
        refuse_unseen(self.path, sorted(set(self.columns.asked_for) - self.named(self.columns.asked_for)))
        for path in self.files:
            with open(path, "rb") as file:
                _check_beginning(path, file.read(_LOOKED_AT))
                file.seek(0)
                start = position = first_row = row = 0
                for line in file:
                    position, row = position + len(line), row + 1
                    if row - first_row == LINES_PER_CHUNK:
                        yield Chunk(path, start, first_row, row - first_row)
                        start, first_row = position, row
                if row > first_row:
                    yield Chunk(path, start, first_row, row - first_row)

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]:
        with open(chunk.file, "rb") as file:
            file.seek(chunk.start)
            for row in range(chunk.first_row, chunk.first_row + chunk.num_rows):
                line = file.readline()
                if line.strip():
                    yield self._sample(chunk.file, row, line)

    def _sample(self, file: Path, row: int, line: bytes) -> RawSample | Problem:
        where, key = f"{file}, line {row + 1}", f"{self._prefixes[file]}-{row:08d}"
        try:
            values = load_json(line)
        except ValueError as error:
            return Problem(where, key, "unreadable_sample", f"not JSON: {error}")
        if not isinstance(values, dict):
            return Problem(where, key, "unreadable_sample", f"a {type(values).__name__}, not an object")
        folder = Path(self.images) if self.images is not None else file.parent
        return self.columns.sample(values, key, where, lambda image: load_below(folder, image))


def refuse_unseen(path: str, columns: Iterable[str]) -> None:
    """Raises ValueError where there are any: columns that the user names, and that no row has."""
    for name in columns:
        raise ValueError(f"{path}: no row has the column {name!r} that --rename names. Correct its spelling.")


def _spellings(name: str) -> tuple[bytes, bytes]:
    """A name as JSON writes it."""
    return json.dumps(name).encode(), json.dumps(name, ensure_ascii=False).encode(errors="surrogateescape")


def _check_beginning(path: Path, data: bytes) -> None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError(f"{path}: it is no text in UTF-8, more likely UTF-16. Convert it: iconv -f UTF-16 -t UTF-8.")
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise ValueError(f"{path}: it is an array of JSON, not one object a line. Give --format json.")


def load_below(folder: Path, image: object) -> bytes:
    """The file that a path, or a struct with one, names. Raises ValueError where it leads out of `folder`; OSError."""
    match image:
        case (str() as path) | {"path": str() as path}:
            return inside(folder, path).read_bytes()
    raise ValueError(f"it must be a path below {folder}; it is a {type(image).__name__}")
