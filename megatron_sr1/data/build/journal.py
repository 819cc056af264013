"""What a build has finished so far, so that one that was killed goes on after its last whole shard.

While a build runs, everything lies in OUT/.NAME.build: plan.json, the finished shards with their indices, and one
record per finished shard. A record is written, by renaming, after its shard: where a record is, its shard is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.data.index import index_path
from megatron_sr1.data.sources.source import Problem
from megatron_sr1.file_lock import lock_file

_PLAN = "plan.json"


@dataclass(frozen=True)
class JournalEntry:
    """One finished shard, and the problems that were found before the sample after it."""

    shard: str
    num_bytes: int
    sha256: str
    fingerprint: str
    keys: tuple[str, ...]
    contents: tuple[str, ...]  # content hash of each sample
    images: Mapping[str, int]  # samples by their number of images
    changes: Mapping[str, int]  # samples by what of them is not as it was found
    problems: tuple[Problem, ...]
    next_chunk: int  # where the next shard begins: number of the chunk, number of the item in it
    next_item: int

    @classmethod
    def parse(cls, text: str) -> JournalEntry:
        tree = json.loads(text)
        lists = {name: tuple(tree[name]) for name in ("keys", "contents")}
        return cls(**{**tree, **lists, "problems": tuple(Problem(**problem) for problem in tree["problems"])})


class Journal:
    """The work folder of one build."""

    def __init__(self, out_dir: Path, name: str) -> None:
        self._out_dir = out_dir
        self.folder = out_dir / f".{name}.build"

    @contextmanager
    def open(self, plan: Mapping[str, Any]) -> Iterator[list[JournalEntry]]:
        """Makes or finds the work folder, for this process alone, and gives the records of the finished shards.

        Raises:
            ValueError: another process works there, or the unfinished build is of another input or other options.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_file(self.folder / "lock") as held:
            if not held:
                raise ValueError(f"{self.folder}: another process is building there. Wait for it.")
            path, text = self.folder / _PLAN, json.dumps(plan, indent=1, sort_keys=True)
            if not self._record_path(0).is_file():
                replace_text(path, text)
            elif path.read_text() != text:
                raise ValueError(
                    f"{self.folder} holds an unfinished build of another input or with other options. Run it with the "
                    "same ones to finish it, or remove the folder to start over."
                )
            yield list(self._records())

    def _records(self) -> Iterator[JournalEntry]:
        number = 0
        while (path := self._record_path(number)).is_file():
            record = JournalEntry.parse(path.read_text())
            self._whole(record)
            yield record
            number += 1

    def _whole(self, record: JournalEntry) -> Path:
        """Where the shard is: a build that was killed at its very end has published some already."""
        for path in (self.folder / record.shard, self._out_dir / record.shard):
            if path.is_file() and path.stat().st_size == record.num_bytes:
                return path
        raise ValueError(
            f"{self.folder / record.shard}: this finished shard is gone or has another size. Remove {self.folder} to "
            "start over."
        )

    def add(self, number: int, record: JournalEntry) -> None:
        """Notes shard `number` as finished; it must be on disk."""
        replace_text(self._record_path(number), json.dumps(asdict(record)))

    def _record_path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"

    def publish(self, records: list[JournalEntry]) -> None:
        """Moves the shards and their indices to the output folder."""
        for record in records:
            for path in (self.folder / record.shard, index_path(self.folder / record.shard)):
                if path.is_file():
                    os.replace(path, self._out_dir / path.name)

    def remove(self) -> None:
        """The last thing of a build; nothing where there is no such folder."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


def replace_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
