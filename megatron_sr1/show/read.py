"""Reads samples of shards, or of rows as they would be built into shards. Nothing is written or fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from megatron_sr1.data import Quarantine, ShardDataset
from megatron_sr1.data.build.inputs import source_of
from megatron_sr1.data.build.layouts import LayoutRules
from megatron_sr1.data.build.samples import build_sample
from megatron_sr1.data.entries import Rows, Shards, read_entries
from megatron_sr1.data.index import INDEX_SUFFIX
from megatron_sr1.data.schema import JSON_EXTENSION, decode_sample
from megatron_sr1.data.sources.columns import Columns
from megatron_sr1.data.sources.opening import open_source
from megatron_sr1.data.sources.source import Format, Problem, Source
from megatron_sr1.data.urls import is_url, shown
from megatron_sr1.show.seen import Look, Seen
from megatron_sr1.types import Prompt, SftSample

_ALL = 10**9


@dataclass
class Found:
    """What was looked at, in order."""

    seen: list[Seen] = field(default_factory=list)  # the first ones, with their pictures
    bad: list[str] = field(default_factory=list)  # why others cannot be used
    broken: list[str] = field(default_factory=list)  # keys of demonstrations that break the layout of their template
    num_good: int = 0
    prompt_tokens: list[int] = field(default_factory=list)  # of each good sample; none without a model
    response_tokens: list[int] = field(default_factory=list)  # of each demonstration among them
    image_tokens: list[int] = field(default_factory=list)  # of each image
    is_cut: bool = False  # there are more samples than were looked at


def read_samples(
    patterns: Sequence[str],
    look: Look,
    *,
    rename: Mapping[str, str],
    kind: Format | None = None,
    images: str | None = None,
    num: int = 3,
    scan: int = 1000,
) -> Found:
    """Looks at the first samples of some data.

    Args:
        patterns: entries as of data.train, or indices of shards.
        rename: {column: field} of rows.
        kind: the format of all files, as tools/build_shards.py takes it; None: by their names.
        images: where paths of images begin; None: beside the rows.
        num: samples that are kept whole.
        scan: samples that are looked at; 0: all.

    Raises:
        ValueError: as `read_entries` and the sources; a URL; an entry that holds nothing.
    """
    url = next((pattern for pattern in patterns if is_url(pattern)), None)
    if url is not None:
        raise ValueError(f"{shown(url)} is behind a URL, and nothing is fetched to be shown. Give a file that is here.")
    found, limit = Found(), scan or _ALL
    items = _items(patterns, rename, kind, images)
    for item in islice(items, limit):
        try:
            if isinstance(item, str):
                raise ValueError(item)
            seen = look(item)
        except ValueError as error:
            found.bad.append(str(error))
            continue
        found.num_good += 1
        found.broken += [] if seen.keeps_layout else [seen.key]
        found.seen += [seen] if len(found.seen) < num else []
        found.prompt_tokens += [] if seen.prompt_tokens is None else [seen.prompt_tokens]
        found.response_tokens += [] if seen.response_tokens is None else [seen.response_tokens]
        found.image_tokens += [picture.num_tokens for picture in seen.pictures if picture.num_tokens is not None]
    found.is_cut = next(items, None) is not None
    return found


def _items(
    patterns: Sequence[str], rename: Mapping[str, str], kind: Format | None, images: str | None
) -> Iterator[Prompt | SftSample | str]:
    """Samples, and in the place of others why they cannot be used."""
    if kind is not None:
        for pattern in patterns:
            yield from _some(_of_rows(open_source(kind, pattern, rename, images)), pattern)
        return
    shards = [pattern.removesuffix(INDEX_SUFFIX) for pattern in patterns]
    for part in (part for entry in read_entries(shards, "PATH") for part in entry):
        if isinstance(part, Shards):
            yield from _some(_of_shards(part), part.paths[0])
        else:
            yield from _some(_of_rows(_source(part, rename, images)), part.paths[0])


def _some(items: Iterator[Prompt | SftSample | str], path: str | Path) -> Iterator[Prompt | SftSample | str]:
    """The same. Raises ValueError where there are none, as training does."""
    first = next(items, None)
    if first is None:
        raise ValueError(f"{path}: there is nothing in it. Write some samples, or leave it out.")
    yield first
    yield from items


def _source(rows: Rows, rename: Mapping[str, str], images: str | None) -> Source:
    if images is not None and rows.format != "parquet":
        return open_source(rows.format, rows.pattern, rename, images)
    return source_of(rows, tuple(map(Path, rows.paths)), Columns(rename))


def _of_shards(part: Shards) -> Iterator[Prompt | SftSample | str]:
    quarantine = Quarantine(_ALL)
    dataset = ShardDataset(part.paths, quarantine=quarantine)
    yield from [bad.reason for bad in quarantine.bad]
    for index in range(len(dataset)):
        try:
            yield dataset.read(index)
        except ValueError as error:
            yield str(error)


def _of_rows(source: Source) -> Iterator[Prompt | SftSample | str]:
    """As tools/build_shards.py would build them, but for repetitions, which one sample alone does not show."""
    for chunk in source.chunks():
        for raw in source.read(chunk):
            built = raw if isinstance(raw, Problem) else build_sample(raw, LayoutRules())
            if isinstance(built, Problem):
                yield f"{built.where}: {built.kind}: {built.reason}"
                continue
            *pictures, (kind, text) = built.members
            assert kind == JSON_EXTENSION, "it comes last"
            yield decode_sample(built.key, text, [data for _, data in pictures], built.where)
