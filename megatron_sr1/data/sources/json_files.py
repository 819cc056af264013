"""JSON files that hold all rows in one array, or in an object under "data"; images are paths below the image folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from megatron_sr1.config.data_suffixes import JSON_SUFFIX
from megatron_sr1.data.json_values import load_json
from megatron_sr1.data.sources.files import find_files, key_prefixes
from megatron_sr1.data.sources.json_lines import load_below, refuse_unseen
from megatron_sr1.data.sources.source import Chunk, Problem, RawSample, RowReader

ROWS_PER_CHUNK = 64
ROWS_KEY = "data"


@dataclass(frozen=True)
class JsonSource:
    """`images`: the folder where paths begin; None: that of the file that names them. `chosen`, `prefix`: as of
    `JsonlSource`."""

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
        return self.chosen or find_files(self.path, (JSON_SUFFIX,))

    @cached_property
    def _prefixes(self) -> Mapping[Path, str]:
        return key_prefixes(self.files, self.prefix)

    def named(self, names: Collection[str]) -> set[str]:
        """Those that any row has."""
        rows = (row for file in self.files for row in _rows(file, file.stat().st_mtime_ns) if isinstance(row, dict))
        return {name for row in rows for name in names if name in row} if names else set()

    def chunks(self) -> Iterator[Chunk]:
        """Raises ValueError where a file does not hold rows, or no row has a column that the user names."""
        refuse_unseen(self.path, sorted(set(self.columns.asked_for) - self.named(self.columns.asked_for)))
        for file in self.files:
            num_rows = len(_rows(file, file.stat().st_mtime_ns))
            for row in range(0, num_rows, ROWS_PER_CHUNK):
                yield Chunk(file, row, row, min(ROWS_PER_CHUNK, num_rows - row))

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]:
        """Raises ValueError as `chunks`."""
        folder = Path(self.images) if self.images is not None else chunk.file.parent
        rows = _rows(chunk.file, chunk.file.stat().st_mtime_ns)
        for row in range(chunk.first_row, chunk.first_row + chunk.num_rows):
            where, key = f"{chunk.file}, row {row}", f"{self._prefixes[chunk.file]}-{row:08d}"
            values = rows[row]
            if isinstance(values, dict):
                yield self.columns.sample(values, key, where, lambda image: load_below(folder, image))
            else:
                yield Problem(where, key, "unreadable_sample", f"a {type(values).__name__}, not an object")


@lru_cache(maxsize=1)
def _rows(file: Path, mtime_ns: int) -> list[Any]:
    """All rows. Each process reads a file once, and not again for the next chunk; `mtime_ns` tells versions apart."""
    try:
        tree = load_json(file.read_bytes())
    except ValueError as error:
        lines = "Where each line is a sample, call it *.jsonl; else it" if "Extra data" in str(error) else "It"
        raise ValueError(
            f"{file}: it is not JSON ({error}). {lines} is truncated or damaged: fetch it again."
        ) from error
    rows = tree.get(ROWS_KEY) if isinstance(tree, dict) else tree
    if not isinstance(rows, list):
        raise ValueError(f"{file}: it holds no array of rows, neither by itself nor under {ROWS_KEY!r}.")
    return rows
