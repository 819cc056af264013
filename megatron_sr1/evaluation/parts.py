"""What engines have written of an evaluation that is not finished: a file each, in the order in which groups end.

A line is {"index": the number of the sample, "record": as in the file of records}. A kill loses the lines that were
being written, and nothing of what was written is made again, whoever goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sr1.evaluation.records import Record, json_line, other_evaluation, whole_lines


class PartWriter:
    """An engine's file. Use it in a `with`; any thread may `add`."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{name}.jsonl").open("ab")
        self._lock = threading.Lock()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())  # whoever puts the parts together may be on another machine
        self._file.close()

    def add(self, index: int, record: Record) -> None:
        """Appends a line; after a kill it is there."""
        self.write({"index": index, "record": asdict(record)})

    def write(self, fields: Mapping[str, Any]) -> None:
        """The same for a line of anything else."""
        line = json_line(fields)
        with self._lock:
            self._file.write(line)
            self._file.flush()


class Lines:
    """The lines of a file of records, read one after the other from where they are."""

    def __init__(self, places: Mapping[int, tuple[Path, int]], chunk: int) -> None:
        """
        Args:
            places: file and offset of each, by number of the sample.
        """
        self._places = places
        self._chunk = chunk

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[bytes]:
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in {path for path, _ in self._places.values()}}
            for number, (_, (path, start)) in enumerate(sorted(self._places.items()), start=1):
                files[path].seek(start)
                record = json.loads(files[path].readline())["record"]
                record["ends_chunk"] = number % self._chunk == 0 or number == len(self)
                yield json_line(record)


class RecordParts:
    """All files of an evaluation; for one rank, while nobody writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def indices(self, made_of: str) -> list[int]:
        """The samples that are recorded, in order. What a kill has cut is cut off.

        Raises:
            ValueError: a whole line is no record, or one of another evaluation; the message names file and line.
        """
        found: set[int] = set()
        for path in self._paths():
            whole = 0
            for (index, record), end in whole_lines(path, _indexed):
                if record["made_of"] != made_of:
                    raise ValueError(other_evaluation(path, record["key"], record["made_of"], made_of))
                found.add(index)
                whole = end
            os.truncate(path, whole)
        return sorted(found)

    def merged(self, chunk: int) -> Lines:
        """The lines of the file of records, in order of the samples: every `chunk`-th, and the last, ends a chunk."""
        return Lines({index: (path, start) for path in self._paths() for index, start in _places(path)}, chunk)

    def remove(self) -> None:
        """All of them, at once for whoever looks: a kill meanwhile leaves none under its name."""
        removed = self.folder.with_name(f"{self.folder.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        if self.folder.is_dir():
            self.folder.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))


def _indexed(line: Any) -> tuple[int, dict[str, Any]]:
    """Number of the sample, and record."""
    index, record = int(line["index"]), {**line["record"]}
    record["made_of"], record["key"]
    return index, record


def _places(path: Path) -> Iterator[tuple[int, int]]:
    start = 0
    for (index, _), end in whole_lines(path, _indexed):
        yield index, start
        start = end
