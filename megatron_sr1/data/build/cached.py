"""Shards of the rows that a configuration names, built once for each content and kept in a cache.

CACHE/built/NAME-HASH holds one build as tools/build_shards.py would leave it, and inputs.json: what it was built of.
The hash is of the files (`inputs`), the columns and the rules of the builder: a changed file leads to another folder.
Where an image file has changed that the rows name, NAME-HASH-1 is built, and so on. One process builds, the others
wait; one that was killed leaves a journal, with which the next goes on. A folder counts only when its report is there,
which is written last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.data.build.builder import RULES, BuildOptions, build_shards, problems_path, whole_report
from megatron_sr1.data.build.inputs import (
    Stamp,
    image_stamps,
    local_files,
    named_columns,
    source_of,
    stamps_now,
    stamps_of,
)
from megatron_sr1.data.build.journal import replace_text
from megatron_sr1.data.build.layouts import LayoutRules
from megatron_sr1.data.entries import Rows
from megatron_sr1.data.quarantine import BadSample
from megatron_sr1.data.sources.columns import Columns
from megatron_sr1.data.urls import shard_name, shown
from megatron_sr1.file_lock import lock_file

MAX_SHARD_BYTES = 512_000_000
_INPUTS, _DOWNLOADS = "inputs.json", "inputs"
_ROWS_ALONE = 2048  # fewer are read by this process: starting others would take longer
_SAY_SECONDS = 30.0
_NAME_CHARACTERS = 60
Say = Callable[[str], None]  # takes a line for people


@dataclass(frozen=True)
class RowsToBuild:
    """What decides the samples."""

    rows: Rows
    columns: Mapping[str, str]  # as `Columns.rename`; those that no file has are not for these
    prefix: str  # of the keys that rows do not give
    key: str  # of the configuration, for messages: data.train

    @property
    def name(self) -> str:
        """Of the shards: the first file's, by which messages tell them apart."""
        stem = os.path.splitext(shard_name(self.rows.paths[0]))[0]
        return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:_NAME_CHARACTERS]


@dataclass(frozen=True)
class BuiltRows:
    """Shards, and what is not in them."""

    shards: tuple[str, ...]
    left_out: tuple[BadSample, ...]
    seen_columns: frozenset[str]  # of those that the configuration names


def built_rows(job: RowsToBuild, cache_dir: Path, say: Say) -> BuiltRows:
    """The shards of some rows; builds them where they are not in the cache.

    Raises:
        ValueError: as `stamps_of` and `build_shards`; a file that changes meanwhile. The message names key and entry.
        OSError: a URL cannot be read, or the cache not be written to.
    """
    with _told(job, None):
        stamps = stamps_of(job.rows)
        base = _base(job, stamps, cache_dir)
        folder = _find(job, base)
    if folder is None:
        base.parent.mkdir(parents=True, exist_ok=True)
        with _alone(base.with_name(f"{base.name}.lock"), job, say):
            folder = _find(job, base)  # somebody else may have built it meanwhile
            while folder is None:
                folder = _build(job, stamps, base, say)
    return _read(job, folder)


def check_rows(job: RowsToBuild, cache_dir: Path) -> frozenset[str]:
    """What can be refused without building, of local files: all but single rows. Writes nothing.

    Returns:
        The columns that the configuration names and the files have; of URLs, nothing is known: all of them.

    Raises:
        ValueError: as `built_rows`.
    """
    if job.rows.is_remote:
        return frozenset(job.columns)
    with _told(job, None):
        stamps = stamps_of(job.rows)
        folder = _find(job, _base(job, stamps, cache_dir))
        if folder is not None:
            return frozenset(_inputs(folder)["seen_columns"])
        files = local_files(job.rows, cache_dir)
        columns = _columns(job, files)
        _count_rows(job, files, columns)
        return frozenset(columns.rename)


def _base(job: RowsToBuild, stamps: list[Stamp], cache_dir: Path) -> Path:
    """Where the first build of this content is, or would be."""
    identity = {
        "rules": RULES,
        "format": job.rows.format,
        "folder": job.rows.folder,
        "files": stamps,
        "columns": list(job.columns.items()),  # their order is that of joined images
        "prefix": job.prefix,
        "max_shard_bytes": MAX_SHARD_BYTES,
    }
    digest = hashlib.sha256(json.dumps(identity).encode(errors="surrogateescape")).hexdigest()[:20]
    return cache_dir / "built" / f"{job.name}-{digest}"


def _numbered(base: Path) -> Iterator[Path]:
    return (base.with_name(f"{base.name}-{number}") if number else base for number in itertools.count())


def _find(job: RowsToBuild, base: Path) -> Path | None:
    """The folder of a whole build whose images are what they were."""
    for folder in _numbered(base):
        if not folder.is_dir():
            return None
        if whole_report(folder, job.name) is None:
            continue
        images = _inputs(folder)["images"]
        if stamps_now(path for path, _, _ in images) == images:
            return folder
    return None


def _inputs(folder: Path) -> Mapping[str, Any]:
    path = folder / _INPUTS
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {name: tree[name] for name in ("seen_columns", "images", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: it cannot be read ({error}). Remove {folder}, to build it again.") from error


@contextmanager
def _alone(lock: Path, job: RowsToBuild, say: Say) -> Iterator[None]:
    with lock_file(lock) as held:
        if held:
            yield
            return
    say(f"{job.key}: waiting for another process, which builds the shards of {shown(job.rows.pattern)}")
    with lock_file(lock, wait=True):
        yield


def _build(job: RowsToBuild, stamps: list[Stamp], base: Path, say: Say) -> Path | None:
    """Builds, or finishes, the first folder that is not whole; None: it was of other images, and is removed."""
    folder = next(folder for folder in _numbered(base) if whole_report(folder, job.name) is None)
    folder.mkdir(exist_ok=True)
    with _told(job, folder):
        files = local_files(job.rows, folder / _DOWNLOADS)
        columns = _columns(job, files)
        num_rows, num_chunks = _count_rows(job, files, columns)
        images = image_stamps(job.rows, files, columns)
        inputs = {"seen_columns": sorted(columns.rename), "images": images, "files": stamps}
        if (folder / _INPUTS).is_file() and _inputs(folder) != inputs:
            shutil.rmtree(folder)
            return None
        replace_text(folder / _INPUTS, json.dumps(inputs))
        say(f"{job.key}: building shards of {shown(job.rows.pattern)}, {num_rows} rows, once, in {folder}")
        workers = 0 if num_rows < _ROWS_ALONE else min(len(os.sched_getaffinity(0)), num_chunks)
        settings = {"columns": list(columns.rename.items()), "prefix": job.prefix}
        options = BuildOptions(folder, job.name, MAX_SHARD_BYTES, workers, settings)
        source = source_of(job.rows, files, columns, job.prefix)
        try:
            report, _ = build_shards(source, LayoutRules(), options, _progress(job, say))
        except BrokenProcessPool:
            raise ValueError("a worker was killed, most likely for want of memory") from None
        if stamps_of(job.rows) != stamps or stamps_now(path for path, _, _ in images) != images:
            shutil.rmtree(folder)
            raise ValueError("a file was changed while shards were built of it. Start again when all are written")
    shutil.rmtree(folder / _DOWNLOADS, ignore_errors=True)
    left_out = ", ".join(f"{count} {kind}" for kind, count in report.left_out.items())
    say(f"{job.key}: {report.num_samples} samples" + (f"; left out: {left_out}" if left_out else ""))
    return folder


def _columns(job: RowsToBuild, files: tuple[Path, ...]) -> Columns:
    seen = named_columns(job.rows, files, job.columns.keys())
    return Columns({column: to for column, to in job.columns.items() if column in seen})


def _count_rows(job: RowsToBuild, files: tuple[Path, ...], columns: Columns) -> tuple[int, int]:
    """Rows and chunks. Raises ValueError where a file is damaged, lacks a column, or there are no rows."""
    counts = [chunk.num_rows for chunk in source_of(job.rows, files, columns).chunks()]
    if not sum(counts):
        raise ValueError(f"{shown(job.rows.paths[0])}: there are no rows. Write some, or leave the entry out.")
    return sum(counts), len(counts)


def _progress(job: RowsToBuild, say: Say) -> Callable[[int, int], None]:
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SAY_SECONDS:
            last = time.monotonic()
            say(f"{job.key}: {done} of {total} rows")

    return advance


def _read(job: RowsToBuild, folder: Path) -> BuiltRows:
    report = whole_report(folder, job.name)
    assert report is not None, folder
    shards = tuple(str(folder / shard["name"]) for shard in report.shards)
    lines = problems_path(folder, job.name).read_text(encoding="utf-8").splitlines() if report.left_out else []
    left_out = tuple(_bad_sample(job, folder, json.loads(line)) for line in lines)
    return BuiltRows(shards, left_out, frozenset(_inputs(folder)["seen_columns"]))


def _bad_sample(job: RowsToBuild, folder: Path, problem: Mapping[str, str]) -> BadSample:
    """A repetition is left out, as by the tool; it is not bad."""
    reason = _in_words_of(job, folder, f"{problem['where']}: {problem['reason']}".rstrip("."))
    reason += f". Mend {job.key}, or let such samples be left out by data.max_bad_samples."
    row = _in_words_of(job, folder, problem["where"])  # with its file: keys may be equal, and names of files too
    return BadSample(row, problem["key"], reason, counts=problem["kind"] != "duplicate")


@contextmanager
def _told(job: RowsToBuild, folder: Path | None) -> Iterator[None]:
    """Errors of the builder in the words of the configuration."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{job.key}: {_in_words_of(job, folder, str(error))}") from error


def _in_words_of(job: RowsToBuild, folder: Path | None, text: str) -> str:
    """The tool's options are keys of the configuration, and a downloaded file is its URL."""
    text = re.sub(r"--rename (\S+?)=", rf"{job.key}_columns.\1=", text)
    text = text.replace("--rename", f"{job.key}_columns").replace("Give --format json.", "Call it *.json.")
    if folder is not None and job.rows.is_remote:
        for number, url in enumerate(job.rows.paths):
            text = text.replace(str(folder / _DOWNLOADS / f"{number:05d}" / shard_name(url)), shown(url))
    return text
