"""Parquet files, and the Arrow files of a data set that was saved with `datasets.save_to_disk`.

An image is what `datasets` stores, a struct of bytes and path, or bytes alone, or a path below the folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sr1.config.data_suffixes import PARQUET_SUFFIXES
from megatron_sr1.data.sources.files import find_files, inside, key_prefixes
from megatron_sr1.data.sources.source import Chunk, Problem, RawSample, RowReader

if TYPE_CHECKING:
    import pyarrow

ARROW_SUFFIX = PARQUET_SUFFIXES[1]
ROWS_AT_ONCE = 64  # of a row group that are turned into Python objects together


@dataclass(frozen=True)
class ParquetSource:
    """A chunk is one row group of a Parquet file, or one record batch of an Arrow stream. `chosen`, `prefix`: as of
    `JsonlSource`."""

    path: str
    columns: RowReader
    chosen: tuple[Path, ...] = ()
    prefix: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order. Raises ValueError as `find_files`."""
        return self._files

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        """Arrow files count only where there is no Parquet file."""
        if self.chosen:
            return self.chosen
        found = find_files(self.path, PARQUET_SUFFIXES)
        return tuple(file for file in found if file.suffix.lower() != ARROW_SUFFIX) or found

    @cached_property
    def _prefixes(self) -> Mapping[Path, str]:
        return key_prefixes(self.files, self.prefix)

    def named(self, names: Collection[str]) -> set[str]:
        """Those that the schema of any file has. Raises ValueError where a file is damaged."""
        return {name for file in self.files for name in _contents(file)[0] if name in names} if names else set()

    @cached_property
    def _folder(self) -> Path:
        """Where the relative paths of images begin."""
        path = Path(self.path).expanduser()
        return path if path.is_dir() else self.files[0].parent

    def chunks(self) -> Iterator[Chunk]:
        """Raises ValueError where a file is damaged or lacks a column."""
        for file in self.files:
            names, part_rows = _contents(file)
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{file} has two columns {doubled[0]!r}: one of them would count. Rename or drop one.")
            self.columns.check(names, file)
            row = 0
            for start, num_rows in enumerate(part_rows):
                yield Chunk(file, start, row, num_rows)
                row += num_rows

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]:
        """Raises ValueError where the file is damaged, or a value cannot be read."""
        row = chunk.first_row
        for batch in _batches(chunk):
            short = [column.name for column in batch.schema if _is_short(column.type)]
            for values in _values(batch, chunk.file, row):
                values |= {name: _shortest(values[name], batch.schema.field(name).type) for name in short}
                key = f"{self._prefixes[chunk.file]}-{row:08d}"
                yield self.columns.sample(values, key, f"{chunk.file}, row {row}", self._load_image)
                row += 1

    def _load_image(self, image: object) -> bytes:
        match image:
            case bytes():
                return image
            case {"bytes": bytes() as data}:
                return data
            case (str() as path) | {"path": str() as path}:
                return inside(self._folder, path).read_bytes()
        raise ValueError(f"it must be bytes, a path, or a struct with one of both; it is a {type(image).__name__}")


def _contents(file: Path) -> tuple[list[str], list[int]]:
    """Names of the columns; rows of each part that can be read by itself."""
    import pyarrow.parquet  # here: reading shards needs no pyarrow

    try:
        if file.suffix.lower() == ARROW_SUFFIX:
            with pyarrow.memory_map(str(file)) as mapped:
                stream = pyarrow.ipc.open_stream(mapped)
                return list(stream.schema.names), [batch.num_rows for batch in stream]
        with pyarrow.parquet.ParquetFile(file) as table:
            groups = range(table.num_row_groups)
            return list(table.schema_arrow.names), [table.metadata.row_group(group).num_rows for group in groups]
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(_damaged(file, error)) from error


def _batches(chunk: Chunk) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    try:
        if chunk.file.suffix.lower() == ARROW_SUFFIX:
            with pyarrow.memory_map(str(chunk.file)) as mapped:
                for number, batch in enumerate(pyarrow.ipc.open_stream(mapped)):
                    if number == chunk.start:
                        yield from (batch.slice(row, ROWS_AT_ONCE) for row in range(0, batch.num_rows, ROWS_AT_ONCE))
                        return
        else:
            with pyarrow.parquet.ParquetFile(chunk.file) as table:
                yield from table.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[chunk.start], use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(_damaged(chunk.file, error)) from error


def _values(batch: pyarrow.RecordBatch, file: Path, first_row: int) -> list[dict[str, Any]]:
    """The rows. Raises ValueError where Python has no such value, naming the row and the column."""
    import pyarrow

    errors = (ValueError, OverflowError, pyarrow.ArrowException)  # text that is no UTF-8, a time out of range
    try:
        return batch.to_pylist()
    except errors as error:
        for row, number in itertools.product(range(batch.num_rows), range(batch.num_columns)):
            try:
                batch.column(number)[row].as_py()
            except errors as cause:
                column = batch.schema.field(number)
                raise ValueError(
                    f"{file}, row {first_row + row}: its column {column.name!r}, of {column.type}, holds a value that "
                    f"cannot be read ({cause}). Mend the value or drop the column, and write the file again: texts are "
                    "UTF-8, times of the years 1 to 9999 in whole microseconds (timestamp[us])."
                ) from error
        raise


def _is_short(kind: pyarrow.DataType) -> bool:
    """Whether it holds floats that Python's are longer than."""
    import pyarrow

    if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
        return True
    return any(_is_short(kind.field(number).type) for number in range(kind.num_fields))


def _shortest(value: Any, kind: pyarrow.DataType) -> Any:
    """The same value with the floats that have the fewest digits: 0.3, where a float32 of it is 0.30000001192092896."""
    import pyarrow

    if value is None:
        return None
    if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
        return float(str((np.float16 if pyarrow.types.is_float16(kind) else np.float32)(value)))
    if isinstance(value, dict):
        return {name: _shortest(inner, kind.field(name).type) for name, inner in value.items()}
    if isinstance(value, list) and kind.num_fields == 1:
        return [_shortest(inner, kind.field(0).type) for inner in value]
    return value


def _damaged(file: Path, error: BaseException) -> str:
    return f"{file}: cannot be read ({error}). It is truncated or damaged: fetch it again."


def may_name_files(file: Path, columns: Collection[str]) -> bool:
    """Whether an image of these columns may be a path: they hold anything but bytes, and structs that have bytes.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow.parquet

    try:
        if file.suffix.lower() == ARROW_SUFFIX:
            with pyarrow.memory_map(str(file)) as mapped:
                return any(name in columns for name in pyarrow.ipc.open_stream(mapped).schema.names)
        with pyarrow.parquet.ParquetFile(file) as table:
            if any(field.name in columns and _may_be_path(field.type) for field in table.schema_arrow):
                return True
            groups = (table.metadata.row_group(number) for number in range(table.num_row_groups))
            within = tuple(f"{name}." for name in columns)  # a name may have dots itself
            leaves = (group.column(number) for group in groups for number in range(group.num_columns))
            return any(_lacks_bytes(leaf) for leaf in leaves if leaf.path_in_schema.startswith(within))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(_damaged(file, error)) from error


def _may_be_path(kind: pyarrow.DataType) -> bool:
    """Whether a value may be something else than bytes; of a struct that has some, `_lacks_bytes` tells."""
    import pyarrow

    types = pyarrow.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if types.is_dictionary(kind) or any(is_list(kind) for is_list in lists):
        return _may_be_path(kind.value_type)
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index < 0 or _may_be_path(kind.field(index).type)
    known = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary, types.is_null)
    return not any(is_known(kind) for is_known in known)


def _lacks_bytes(leaf: Any) -> bool:
    """Of the column `bytes` of a struct: whether any may be null."""
    if not leaf.path_in_schema.endswith(".bytes"):
        return False
    statistics = leaf.statistics
    return statistics is None or not statistics.has_null_count or statistics.null_count > 0
