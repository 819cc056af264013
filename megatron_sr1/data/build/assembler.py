"""Cuts a sequence of samples into shards, without repetitions, and notes every finished one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_sr1.data.build.journal import Journal, JournalEntry
from megatron_sr1.data.build.samples import BuiltSample
from megatron_sr1.data.build.tar import ShardFile, tar_blocks
from megatron_sr1.data.sources.source import Problem


@dataclass(frozen=True)
class Cut:
    """How shards are cut."""

    name: str  # of the shards: <name>-00000.tar
    max_shard_bytes: int
    keep_duplicates: bool  # take a sample again whose content was there under another key
    tokenizer: str  # for the index


class Assembler:
    """Takes samples one by one, leaves out repetitions, and cuts shards."""

    def __init__(self, journal: Journal, cut: Cut, records: list[JournalEntry]) -> None:
        """`records`: of the finished shards; new ones are appended."""
        self._journal, self._cut, self._records = journal, cut, records
        self._shard: ShardFile | None = None
        self._keys: list[str] = []  # of the open shard
        self._contents: list[str] = []
        self._images: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()
        self.problems: list[Problem] = []  # since the last finished shard
        self._key_of_content = {
            content: key for record in records for content, key in zip(record.contents, record.keys, strict=True)
        }
        self._seen_keys = {key for record in records for key in record.keys}

    @property
    def position(self) -> tuple[int, int]:
        """The first item, as (chunk, item), that no finished shard accounts for."""
        return (self._records[-1].next_chunk, self._records[-1].next_item) if self._records else (0, 0)

    def add(self, item: BuiltSample | Problem, position: tuple[int, int]) -> None:
        """Appends a sample to the open shard; one that does not fit closes it. A larger one has a shard of its own."""
        problem = item if isinstance(item, Problem) else self._repetition(item)
        if problem is not None:
            self.problems.append(problem)
            return
        assert isinstance(item, BuiltSample)
        blocks = tar_blocks(item)
        if self._shard is not None and self._shard.num_bytes_with(blocks) > self._cut.max_shard_bytes:
            self.finish(position)
        if self._shard is None:
            name = f"{self._cut.name}-{len(self._records):05d}.tar"
            self._shard = ShardFile(self._journal.folder / name)
        self._shard.add(item, blocks)
        self._keys.append(item.key)
        self._contents.append(item.content)
        self._images[str(len(item.image_sizes))] += 1
        self._changes.update(item.changes)
        self._seen_keys.add(item.key)
        self._key_of_content[item.content] = item.key

    def finish(self, position: tuple[int, int]) -> None:
        """Closes the open shard, if there is one; what comes next stands at `position`."""
        if self._shard is None:
            return
        index, sha256 = self._shard.close(self._cut.tokenizer)
        keys, contents, problems = tuple(self._keys), tuple(self._contents), tuple(self.problems)
        shard = self._shard.path.name
        counts = dict(self._images), dict(self._changes)
        record = JournalEntry(
            shard, index.num_bytes, sha256, index.fingerprint, keys, contents, *counts, problems, *position
        )
        self._journal.add(len(self._records), record)
        self._records.append(record)
        self._shard, self._keys, self._contents, self.problems = None, [], [], []
        self._images, self._changes = Counter(), Counter()

    def _repetition(self, sample: BuiltSample) -> Problem | None:
        if not self._cut.keep_duplicates and sample.content in self._key_of_content:
            reason = f"it asks, shows and answers the same as sample {self._key_of_content[sample.content]!r}"
            return Problem(sample.where, sample.key, "duplicate", reason)
        if sample.key in self._seen_keys:
            return Problem(sample.where, sample.key, "repeated_key", f"the key {sample.key!r} is taken already")
        return None
