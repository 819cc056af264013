"""From the sets of runs to chunks: of each set a table for the list, and its groups in pieces for what is opened.

One set is in memory at a time. What finds a prompt over the steps again is sorted into buckets on disk.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sr1.report.viewer.filters import as_float, mean_of
from megatron_sr1.report.viewer.folder import ChunkFolder
from megatron_sr1.report.viewer.names import reward_name
from megatron_sr1.report.viewer.shown import FILTERS, GAP, RunToShow, SetToShow, ShownGroup, ShownResponse, ShownSample

CHUNK_SAMPLES = 64  # of a chunk of details, unless a group has more
NUM_BUCKETS = 64
_PROBLEM_CHARACTERS = 300  # of a problem, as the list is searched
_DIGITS = 4  # significant, of what is measured of tokens
_BITS = {name: 1 << place for place, name in enumerate(FILTERS)}


def write_run(run: RunToShow, number: int, folder: ChunkFolder) -> dict[str, Any]:
    """Writes all chunks of a run and returns what the page must know before it loads one.

    Args:
        number: of the run, in the names of its chunks.
    """
    prefix = f"{folder.stamp}-r{number}"
    buckets = _Buckets(folder, f"{prefix}-p")
    sets = []
    for place, shown in enumerate(run.sets):
        sets.append(_write_set(shown, f"{prefix}-s{place}", folder, buckets, place))
    return {"name": run.name, "leftOut": list(run.left_out), "sets": sets, "buckets": buckets.finish()}


def _write_set(shown: SetToShow, name: str, folder: ChunkFolder, buckets: _Buckets, place: int) -> dict[str, Any]:
    told: dict[str, Any] = {"name": shown.name, "title": shown.title, "kind": shown.kind, "step": shown.step}
    told |= {
        "chunk": name,
        "samples": 0,
        "groups": 0,
        "streams": [],
        "absent": {},
        "notes": [],
        "problem": "",
        "measures": {},
    }
    table = _Table()
    try:
        found = shown.make()
    except ValueError as error:
        return told | {"problem": str(error)}
    try:
        for number, groups in enumerate(_pieces(found.groups)):
            folder.write(f"{name}-{number}", [_group_fields(group) for group in groups])
            for group in groups:
                table.add(group, number)
                buckets.add(group, place)
    except ValueError as error:  # of evaluations, whose records are read as they are shown; what came before stays
        told["problem"] = str(error)
    folder.write(name, table.fields())
    rewards = [{"name": each, "title": reward_name(each)} for each in table.rewards]
    return told | {
        "samples": table.num_samples,
        "groups": len(table.groups["number"]),
        "streams": [asdict(stream) for stream in found.streams],
        "absent": dict(found.absent),
        "notes": list(found.notes),
        "rewards": rewards,
        "counts": table.counts(),
        "measures": dict(found.measures),
        "strongest": {name: _rounded(value) for name, value in table.strongest.items()},
    }


def _pieces(groups: Iterable[ShownGroup]) -> Iterator[list[ShownGroup]]:
    """Some groups together; what is read before an error is handed on before it is raised."""
    piece: list[ShownGroup] = []
    try:
        for group in groups:
            piece.append(group)
            if sum(len(one.samples) for one in piece) >= CHUNK_SAMPLES:
                yield piece
                piece = []
    except ValueError:
        if piece:
            yield piece
        raise
    if piece:
        yield piece


class _Table:
    """Columns of a set: what its list is sorted, filtered and searched by."""

    def __init__(self) -> None:
        self.groups: dict[str, list[Any]] = {
            name: [] for name in ("number", "key", "problem", "answer", "source", "chunk", "bucket", "first")
        }
        self.samples: dict[str, list[Any]] = {name: [] for name in ("group", "sample", "filters", "tokens", "surprise")}
        self.rewards: dict[str, list[Any]] = {}
        self.advantages: dict[str, list[Any]] = {}
        self.measures: dict[str, list[Any]] = {}
        self.strongest: dict[str, float] = {}  # of what is measured of tokens
        self.num_samples = 0

    def add(self, group: ShownGroup, chunk: int) -> None:
        """`chunk`: the number of the one that holds the group."""
        row = (group.number, group.key, group.problem[:_PROBLEM_CHARACTERS], group.answer, group.source, chunk)
        values = (*row, bucket_of(group.key), self.num_samples)
        for column, value in zip(self.groups.values(), values, strict=True):
            column.append(value)
        for sample in group.samples:
            self._add_sample(len(self.groups["number"]) - 1, sample)

    def _add_sample(self, group: int, sample: ShownSample) -> None:
        first = sample.responses[0] if sample.responses else None
        bits = sum(_BITS[name] for name in sample.filters)
        surprise = None if first is None else _mean(first.surprise or ())
        tokens = None if first is None else first.num_tokens
        values = (group, sample.number, bits, tokens, surprise)
        for column, value in zip(self.samples.values(), values, strict=True):
            column.append(value)
        means = {name: mean_of(value) for name, value in sample.rewards.items()}
        parts = ((self.rewards, means), (self.advantages, sample.advantages), (self.measures, self._measured(sample)))
        for columns, found in parts:
            for name in (*columns, *(name for name in found if name not in columns)):
                column = columns.setdefault(name, [None] * self.num_samples)
                value = found.get(name)
                column.append(value if value is None else _rounded(value))
        self.num_samples += 1

    def _measured(self, sample: ShownSample) -> dict[str, float]:
        """Of a sample: of log-prob gaps the largest of a token, of others the mean of the first response."""
        found: dict[str, float] = {}
        gaps: list[float] = []
        for place, response in enumerate(sample.responses):
            for name, values in response.measures.items():
                sizes = [abs(value) for value in values]
                self.strongest[name] = max([self.strongest.get(name, 0.0), *filter(math.isfinite, sizes)])
                if name == GAP:
                    gaps += sizes
                elif place == 0 and values:
                    found[name] = mean_of(values)
        if gaps:
            found[GAP] = max(gaps) if all(map(math.isfinite, gaps)) else math.nan
        return found

    def counts(self) -> dict[str, int]:
        """Of samples, by filter."""
        return {name: sum(1 for bits in self.samples["filters"] if bits & bit) for name, bit in _BITS.items()}

    def fields(self) -> dict[str, Any]:
        """As the page reads them."""
        return {
            "groups": self.groups,
            **self.samples,
            "rewards": self.rewards,
            "advantages": self.advantages,
            "measures": self.measures,
        }


class _Buckets:
    """Where each prompt of a run occurs. Kept on disk, as a run may have any number of them."""

    def __init__(self, folder: ChunkFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._raw = folder.image_folder.parent / f".{name}"
        self._raw.mkdir()
        self._waiting: dict[int, list[str]] = {}
        self._place = -1

    def add(self, group: ShownGroup, place: int) -> None:
        """`place`: of the set that has it."""
        if place != self._place:
            self._flush()
            self._place = place
        rewards: dict[str, list[float]] = {}
        for sample in group.samples:
            for name, value in sample.rewards.items():
                rewards.setdefault(name, []).append(mean_of(value))
        means = {name: _mean(values) for name, values in rewards.items()}
        line = json.dumps([group.key, place, group.number, len(group.samples), means, asked(group.problem)])
        self._waiting.setdefault(bucket_of(group.key), []).append(line)

    def finish(self) -> list[int]:
        """One chunk a bucket: by key, [set, group, samples, mean of each reward, question] in the order of sets.
        Returns which there are."""
        self._flush()
        files = sorted(self._raw.iterdir())
        for file in files:
            found: dict[str, list[Any]] = {}
            with file.open(encoding="ascii") as lines:
                for line in lines:
                    key, *entry = json.loads(line)
                    found.setdefault(key, []).append(entry)
            self._folder.write(f"{self._name}{file.name}", found)
            file.unlink()
        self._raw.rmdir()
        return [int(file.name) for file in files]

    def _flush(self) -> None:
        for bucket, lines in self._waiting.items():
            with Path(self._raw, str(bucket)).open("a", encoding="ascii") as file:
                file.writelines(f"{line}\n" for line in lines)
        self._waiting = {}


def bucket_of(key: str) -> int:
    """Which bucket has a prompt."""
    return zlib.crc32(key.encode("utf-8", errors="surrogatepass")) % NUM_BUCKETS


def asked(problem: str) -> int:
    """Tells questions apart that data sets have under one key."""
    return zlib.crc32(problem.encode("utf-8", errors="surrogatepass"))


def _group_fields(group: ShownGroup) -> dict[str, Any]:
    """Without what is empty."""
    fields = {name: value for name, value in vars(group).items() if name != "samples" and value not in ("", ())}
    fields |= {"number": group.number, "key": group.key, "asked": asked(group.problem)}
    return fields | {"samples": [_sample_fields(sample) for sample in group.samples]}


def _sample_fields(sample: ShownSample) -> dict[str, Any]:
    return {
        "number": sample.number,
        "description": sample.description,
        "rewards": dict(sample.rewards),
        "advantages": dict(sample.advantages),
        "filters": sum(_BITS[name] for name in sample.filters),
        "facts": dict(sample.facts),
        "responses": [_response_fields(response) for response in sample.responses],
    }


def _response_fields(response: ShownResponse) -> dict[str, Any]:
    """Without what is not known; of one with tokens the text is left out, which is theirs. Offsets are those of
    JavaScript, which counts what is beyond 16 bits twice."""
    fields = {name: value for name, value in vars(response).items() if value is not None and value not in ((), {})}
    if response.tokens is not None:
        del fields["text"]
    if response.surprise is not None:
        fields["surprise"] = [_rounded(value) for value in response.surprise]
    if response.measures:
        fields["measures"] = {name: [_rounded(one) for one in values] for name, values in response.measures.items()}
    if response.blocks and not response.text.isascii():
        fields["blocks"] = [
            (name, _utf16(response.text[:start]), _utf16(response.text[:end])) for name, start, end in response.blocks
        ]
    return fields | {"facts": dict(response.facts)}


def _utf16(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)


def _mean(values: Sequence[float]) -> float | None:
    return _rounded(mean_of(values)) if values else None


def _rounded(value: float) -> float:
    value = as_float(value)
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else value


def told_filters() -> list[Mapping[str, Any]]:
    """As the page reads them."""
    return [
        {"name": name, "title": title, "meaning": meaning, "bit": _BITS[name]}
        for name, (title, meaning) in FILTERS.items()
    ]
