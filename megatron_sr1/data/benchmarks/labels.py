"""Answers that the authors of a set publish in a file of their own: put beside the questions, by the column `id`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sr1.data.benchmarks.benchmark import Benchmark
from megatron_sr1.data.json_values import load_json
from megatron_sr1.data.sources.source import Chunk, Problem, RawSample, Source

ID = "id"


def find_labels(name: str, files: Sequence[Path]) -> Path | None:
    """The file of this name in the folder of the questions, or the one above. None: there is none.

    Raises:
        ValueError: there are several, of questions in several folders.
    """
    places = {folder / name for file in files for folder in (file.parent, file.parent.parent)}
    found = sorted(place for place in places if place.is_file() and place not in files)
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} may both hold the answers. Give one file of questions as --input.")
    return found[0] if found else None


@dataclass(frozen=True)
class LabelledSource:
    """Questions and their answers; a build is made anew where either file has changed."""

    questions: Source
    labels: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """Of both."""
        return (*self.questions.files, self.labels)

    def chunks(self) -> Iterator[Chunk]:
        """Those of the questions. Raises ValueError as they do, and where the file of answers is damaged."""
        _read_labels(self.labels, self.labels.stat().st_mtime_ns)
        return self.questions.chunks()

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]:
        """Raises ValueError as `chunks`."""
        return self.questions.read(chunk)


@dataclass(frozen=True)
class LabelledRows:
    """Reads rows as the benchmark does, each with the columns of its answer."""

    benchmark: Benchmark
    labels: Path

    @property
    def asked_for(self) -> Collection[str]:
        """None: see `RowReader`."""
        return ()

    def check(self, names: Sequence[str], file: Path) -> None:
        """As of the benchmark."""
        self.benchmark.check(names, file)

    def sample(
        self, row: Mapping[str, Any], key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        """As `Benchmark.sample`."""
        labels = _read_labels(self.labels, self.labels.stat().st_mtime_ns)
        number = row.get(ID)
        if number is not None and str(number) not in labels:
            return Problem(where, key, "empty_answer", f"{self.labels.name} has no {ID}={number!r}")
        return self.benchmark.sample({**labels.get(str(number), {}), **row}, key, where, load_image)


@lru_cache(maxsize=1)
def _read_labels(path: Path, mtime_ns: int) -> Mapping[str, Mapping[str, Any]]:
    """The answers by id. Each process reads the file once; `mtime_ns` tells versions apart."""
    try:
        rows = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: it is not JSON ({error}). It is truncated or damaged: fetch it again.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get(ID) is not None for row in rows):
        raise ValueError(f"{path}: it must be an array of objects with an {ID}. Fetch it again.")
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if str(row[ID]) in found:
            raise ValueError(f"{path}: it has {ID}={row[ID]!r} twice. Fetch it again, or take one of them out.")
        found[str(row[ID])] = {name: value for name, value in row.items() if name != ID}
    return found
