"""From the `data` section of the configuration to datasets and streams."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sr1.config import DataConfig
from megatron_sr1.config.rules import ConfigError, require
from megatron_sr1.data.build.cached import RowsToBuild, Say, built_rows, check_rows
from megatron_sr1.data.entries import Rows, Shards, each_once, read_entries
from megatron_sr1.data.quarantine import Quarantine
from megatron_sr1.data.remote import ShardCache
from megatron_sr1.data.shards import ShardDataset, distinct_names
from megatron_sr1.data.sources.files import key_prefixes
from megatron_sr1.data.sources.option_columns import is_option_name
from megatron_sr1.data.sources.source import IMAGE_COLUMNS, KEY_COLUMN, SCHEMA_COLUMNS
from megatron_sr1.data.sources.turns import TURN_COLUMNS
from megatron_sr1.data.stream import SampleStream, VisualTokens
from megatron_sr1.data.urls import is_url, shown

DataList = Literal["train", "cold_start", "heldout"]


@dataclass(frozen=True)
class _List:
    """One list of the configuration."""

    patterns: tuple[str, ...]
    weights: tuple[float, ...]
    columns: Mapping[str, str]


def check_data(config: DataConfig, name: DataList) -> list[str]:
    """What can be known of `data.<name>` without building anything. Returns what to tell of splits that are chosen.

    Raises:
        MissingFiles: an entry that matches no file.
        ValueError: as `read_entries`; files of rows that are damaged, empty or lack a column.
        ConfigError: columns that no file has, or lengths of prompts that are needed and not known.
    """
    datasets = _datasets(config, name)
    jobs = [part for dataset in datasets for part in dataset if isinstance(part, RowsToBuild)]
    _check_columns(config, name, [check_rows(job, _cache_dir(config)) for job in jobs])
    return [job.rows.note for job in jobs if job.rows.note]


def prepare_data(config: DataConfig, name: DataList, say: Say) -> None:
    """Builds the shards of all rows of `data.<name>` that the cache lacks: before ranks are started, whose collectives
    would not wait for it.

    Raises:
        ValueError: as `built_rows` and `check_data`; more rows are left out than data.max_bad_samples allows.
    """
    for dataset in _datasets(config, name):
        for part in dataset:
            if isinstance(part, RowsToBuild) and part.rows.note:
                say(part.rows.note)
    _built(config, name, Quarantine(config.max_bad_samples), say, {})


def files_of(config: DataConfig, name: DataList) -> dict[str, str]:
    """The files of `data.<name>` as they are spelled, by what each is. Raises ValueError as `read_entries`."""
    parts = [part for entry in read_entries(_list(config, name).patterns, f"data.{name}") for part in entry]
    return {file: path for part in parts for file, path in zip(part.identities(), part.paths, strict=True)}


def open_dataset(config: DataConfig, name: DataList, quarantine: Quarantine) -> ShardDataset:
    """All samples of `data.<name>`, as one dataset.

    Raises:
        ValueError: as `check_data`, `built_rows` and `ShardDataset`.
    """
    (dataset,) = _open(config, name, quarantine)
    return dataset


def open_stream(
    config: DataConfig,
    name: Literal["train", "cold_start"],
    seed: int,
    quarantine: Quarantine,
    visual_tokens: VisualTokens,
    engine_tokens: int = 0,
) -> SampleStream:
    """The stream over `data.<name>`: one dataset, or, with `data.<name>_weights`, a mixture of its entries.

    Args:
        engine_tokens: the longest prompt that an engine takes. Without data.max_prompt_tokens it is the limit, wherever
            an index has lengths; 0: there is no engine.

    Raises:
        ValueError: as `open_dataset` and `SampleStream`.
    """
    return SampleStream(
        _open(config, name, quarantine),
        seed,
        weights=_list(config, name).weights,
        window=config.shuffle_window,
        max_prompt_tokens=config.max_prompt_tokens or engine_tokens,
        needs_lengths=config.max_prompt_tokens > 0,
        visual_tokens=visual_tokens,
    )


def _list(config: DataConfig, name: DataList) -> _List:
    patterns, weights, columns = {
        "train": (config.train, config.train_weights, config.train_columns),
        "cold_start": (config.cold_start, config.cold_start_weights, config.cold_start_columns),
        "heldout": (config.heldout, (), config.heldout_columns),
    }[name]
    return _List(patterns, weights, {column: to or "" for column, to in columns.items()})


def _cache_dir(config: DataConfig) -> Path:
    return Path(config.cache_dir).expanduser()


def _check_cache_dir(config: DataConfig) -> None:
    """Raises ConfigError where it is, or would be in, a file, or a link that leads nowhere."""
    try:
        folder = _cache_dir(config)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        is_folder = there.is_dir()
    except (OSError, RuntimeError) as error:  # a circle of links; the home of nobody
        raise ConfigError(f"data.cache_dir={config.cache_dir!r} is not allowed: {error}. Name another one.") from error
    remedy = "Name another one."
    require(is_folder, "data.cache_dir", config.cache_dir, f"a folder, and {there} is none", remedy)


def _datasets(config: DataConfig, name: DataList) -> list[list[Shards | RowsToBuild]]:
    """The parts of each dataset: of each entry with weights, else of all. Raises as `check_data`."""
    given, key = _list(config, name), f"data.{name}"
    entries = read_entries(given.patterns, key)
    datasets = entries if given.weights else [[part for entry in entries for part in entry]]
    rows = [part for dataset in datasets for part in dataset if isinstance(part, Rows)]
    if rows or any(is_url(path) for dataset in datasets for part in dataset for path in part.paths):
        _check_cache_dir(config)
    require(
        bool(rows) or not given.columns,
        f"{key}_columns",
        dict(given.columns),
        f"left out where {key} has shards alone, whose fields have their names",
        "Leave it out.",
    )
    _check_fields(given.columns, key)
    require(
        not rows or name == "heldout" or not config.max_prompt_tokens,
        "data.max_prompt_tokens",
        config.max_prompt_tokens,
        f"0 where {key} has Parquet or JSON, the lengths of whose prompts are not known",
        "Build shards of them with tools/build_shards.py --model, or leave the key out.",
    )
    return [list(_jobs(dataset, given.columns, key)) for dataset in datasets]


def _check_fields(columns: Mapping[str, str], key: str) -> None:
    """Whether each column becomes a field: under a misspelled name it would be metadata, and the field missing."""
    known = (*SCHEMA_COLUMNS, *IMAGE_COLUMNS, KEY_COLUMN, *TURN_COLUMNS)
    for column, to in columns.items():
        near = difflib.get_close_matches(to, known, n=3)
        if column in known and to not in known:
            near = [f"{{{to}: {column}}}"]
        require(
            to in ("", column, *known) or is_option_name(to),
            f"{key}_columns",
            {column: to},
            f"{{column: field}} with a field of {', '.join(known)}, the column's own name, or null",
            f"Did you mean {' or '.join(near)}?" if near else f"To keep it as metadata write {{{column}: {column}}}.",
        )


def _jobs(dataset: Sequence[Shards | Rows], columns: Mapping[str, str], key: str) -> Iterator[Shards | RowsToBuild]:
    """Keys begin with the names of their files; where another part of the dataset has such a name, with a number."""
    taken: set[str] = set()
    for number, part in enumerate(dataset):
        if isinstance(part, Shards):
            yield part
            continue
        files = [Path(shown(path)) for path in part.paths]
        clashes = not taken.isdisjoint(key_prefixes(files).values())
        prefix = f"{number:05d}-" if clashes else ""
        taken |= set(key_prefixes(files, prefix).values())
        yield RowsToBuild(part, columns, prefix, key)


def _check_columns(config: DataConfig, name: DataList, seen: Sequence[frozenset[str]]) -> None:
    """Whether each column that is named is one of some entry's: entries may be called otherwise, a slip is refused."""
    absent = sorted(_list(config, name).columns.keys() - frozenset().union(*seen))
    require(
        not absent,
        f"data.{name}_columns",
        absent[0] if absent else "",
        f"a column of the files of data.{name}, and none of them has it",
        "Correct its spelling, or leave it out.",
    )


def _built(
    config: DataConfig, name: DataList, quarantine: Quarantine, say: Say, origins: dict[str, str]
) -> list[list[str]]:
    """The shards of each dataset. What the builder left out goes into the quarantine.

    Args:
        origins: is given the entry that each built shard is of.
    """
    seen: list[frozenset[str]] = []
    datasets: list[list[str]] = []
    for dataset in _datasets(config, name):
        shards: list[str] = []
        for part in dataset:
            if isinstance(part, Shards):
                shards += part.paths
                continue
            built = built_rows(part, _cache_dir(config), say)
            shards += built.shards
            origins |= dict.fromkeys(built.shards, shown(part.rows.pattern))
            seen.append(built.seen_columns)
            quarantine.remember([sample for sample in built.left_out if not sample.counts])
            for sample in built.left_out:
                quarantine.add(sample)
        datasets.append(each_once(shards))
    _check_columns(config, name, seen)
    return datasets


def _open(config: DataConfig, name: DataList, quarantine: Quarantine) -> list[ShardDataset]:
    cache = ShardCache(_cache_dir(config), int(config.cache_gib * 2**30))
    origins: dict[str, str] = {}
    datasets = _built(config, name, quarantine, lambda line: None, origins)
    names = iter(distinct_names([shard for shards in datasets for shard in shards]))
    renamed = (column for column, to in _list(config, name).columns.items() if to == KEY_COLUMN)
    column = next(renamed, KEY_COLUMN)
    advice = f"Rows need none: data.{name}_columns={{{column}: null}} leaves the column out."
    return [
        ShardDataset(
            shards,
            quarantine=quarantine,
            cache=cache,
            names=list(itertools.islice(names, len(shards))),
            origins={shard: (origins[shard], advice) for shard in shards if shard in origins},
        )
        for shards in datasets
    ]
