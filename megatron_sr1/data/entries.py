"""What the entries of a list of data mean: shards, which are read as they are, or rows that shards are built of.

    data/train-*.tar, https://host/train-{0..7}.tar      shards
    rows.parquet, rows.jsonl, hf://datasets/a/b/x.jsonl  rows
    a/folder                                             the shards in and below it, or the rows of its only split
    a/folder:test, a/folder:hard/test                    one split, of one configuration, of a Hugging Face data set

Names are read, and cards of data sets; of the files themselves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_sr1.config.data_suffixes import JSON_SUFFIX, JSONL_SUFFIXES, PARQUET_SUFFIXES, SHARD_SUFFIX
from megatron_sr1.data.file_systems import check_openable
from megatron_sr1.data.hub_folders import Splits, refuse_parts, splits_of
from megatron_sr1.data.patterns import has_braces, matching, missing
from megatron_sr1.data.sources.files import SPLIT_NAMES, is_packed
from megatron_sr1.data.urls import expand_url, is_url, same_file, shown

RowFormat = Literal["parquet", "jsonl", "json"]
_FORMATS: dict[str, RowFormat] = {
    **dict.fromkeys(PARQUET_SUFFIXES, "parquet"),
    **dict.fromkeys(JSONL_SUFFIXES, "jsonl"),
    JSON_SUFFIX: "json",
}
# what a shard is not called, whatever else it is called: tables and archives of other kinds, pictures, texts
_NOT_DATA = frozenset(
    (
        *(".csv", ".tsv", ".xls", ".xlsx", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".npy", ".npz", ".pkl"),
        *(".pickle", ".pt", ".db", ".sqlite", ".lance", ".zip", ".7z", ".rar", ".txt", ".md", ".yaml", ".yml"),
        *(".xml", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    )
)
_OF_FOLDERS = (*PARQUET_SUFFIXES, *JSONL_SUFFIXES)  # a .json of a folder says something about the data
_OF_BUILDS = (".problems.jsonl",)  # tools/build_shards.py leaves it beside its shards
_TRAIN = "train"


@dataclass(frozen=True)
class Shards:
    """Paths and URLs of shards, in order."""

    pattern: str  # as the configuration has it
    paths: tuple[str, ...]

    def identities(self) -> tuple[str, ...]:
        """What each file is, however it is spelled."""
        return tuple(map(_identity, self.paths))


@dataclass(frozen=True)
class Rows:
    """Files of rows of one format, in order."""

    pattern: str  # as the configuration has it
    format: RowFormat
    paths: tuple[str, ...]  # absolute, or URLs
    folder: str = ""  # of a data set, where the paths of its images begin
    note: str = ""  # what was chosen of several splits

    def identities(self) -> tuple[str, ...]:
        """As `Shards.identities`."""
        return tuple(map(_identity, self.paths))

    @property
    def is_remote(self) -> bool:
        """Whether the files are behind URLs; never some of them."""
        return is_url(self.paths[0])


Part = Shards | Rows


def read_entries(patterns: Sequence[str], key: str) -> list[list[Part]]:
    """Of each entry its parts: one, or one for each alternative of braces that name folders.

    Args:
        key: the configuration key that the entries come from: "data.train". Of a data set with several splits
            `data.train` and `data.cold_start` take the split `train`; `data.heldout` takes none by itself.

    Raises:
        MissingFiles: an entry that matches no file.
        ValueError: no entry; an entry whose files are of several kinds, or of splits that it does not tell; files of
            rows that two entries name; a URL that nothing here opens.
    """
    if not patterns:
        raise ValueError(f"{key} is empty. Set {key} to a list of files, for example [data/train-*.tar].")
    default = "" if key == "data.heldout" else _TRAIN
    entries = [list(_parts(pattern, key, default)) for pattern in patterns]
    seen: dict[str, str] = {}
    for part in (part for entry in entries for part in entry if isinstance(part, Rows)):
        for path, identity in zip(part.paths, part.identities(), strict=True):
            if identity in seen:
                by = f"{shown(seen[identity])!r} and {shown(part.pattern)!r}"
                raise ValueError(
                    f"{key}: {shown(path)} is named twice, by {by}. Leave one out; a weight makes it count more."
                )
            seen[identity] = part.pattern
    return entries


def expand_shards(patterns: Sequence[str], key: str) -> list[str]:
    """The shards of entries that have nothing else, in order, each file once, however it is spelled.

    Raises:
        ValueError: as `read_entries`; an entry of rows.
    """
    parts = [part for entry in read_entries(patterns, key) for part in entry]
    rows = next((part for part in parts if isinstance(part, Rows)), None)
    if rows is not None:
        raise ValueError(f"{key}: {shown(rows.pattern)} is {rows.format}, and only shards are taken here.")
    return each_once(path for part in parts for path in part.paths)


def each_once(shards: Iterable[str]) -> list[str]:
    """In order, without those that lead to a file that was there."""
    found: dict[str, str] = {}
    for path in shards:
        found.setdefault(path if is_url(path) else os.path.realpath(path), path)
    return list(found.values())


def _parts(pattern: str, key: str, default: str) -> Iterator[Part]:
    if is_url(pattern):
        urls = expand_url(pattern)
        for url in urls:
            check_openable(url)
        yield _of_one_kind(pattern, urls, key)
        return
    is_literal = bool(matching(pattern)) or not has_braces(pattern)
    found: list[str] = []
    for path in [pattern] if is_literal else expand_url(pattern):
        folder, split = _folder_of(path)
        if folder is not None:
            yield _of_folder(pattern, folder, split, key, default)
            continue
        there = matching(path)
        files = [file for file in there if os.path.isfile(file)]
        _refuse_folders(path, there, files, key)
        if not files:
            raise missing(key, path)
        found += files
    if found:
        yield _of_one_kind(pattern, found, key)


def _refuse_folders(path: str, there: Sequence[str], files: Sequence[str], key: str) -> None:
    """A folder that a pattern matches, none of whose files it matches, would be passed over in silence."""
    within = {str(parent) for file in files for parent in Path(file).parents}
    folder = next((name for name in there if os.path.isdir(name) and str(Path(name)) not in within), None)
    if folder is not None and _below(Path(folder))[0]:
        raise ValueError(
            f"{key}: {shown(path)!r} matches the folder {folder}. Make an entry of each folder, and a pattern for "
            f"files alone, for example '{os.path.dirname(path)}/*{SHARD_SUFFIX}'."
        )


def _folder_of(path: str) -> tuple[Path | None, str]:
    """The folder that a path is, and the split behind its colon; None where it is no folder."""
    head, _, split = path.rpartition(":")
    for spelled in (path, os.path.expanduser(path)):
        if os.path.exists(spelled):
            return (Path(spelled), "") if os.path.isdir(spelled) else (None, "")
    spelled = os.path.expanduser(head)
    return (Path(spelled), split) if split and os.path.isdir(spelled) else (None, "")


def _of_one_kind(pattern: str, paths: Sequence[str], key: str) -> Part:
    kinds: dict[RowFormat | None, str] = {}
    for path in paths:
        kinds.setdefault(_format_of(path), path)
    if len(kinds) > 1:
        first = ", ".join(f"{shown(path)} ({kind or 'a shard'})" for kind, path in kinds.items())
        raise ValueError(
            f"{key}: {shown(pattern)!r} names files of several kinds: {first}. Make an entry of each kind."
        )
    for path in paths:
        if _suffix_of(path) in _NOT_DATA and not path.startswith("pipe:"):  # a command may name anything
            raise ValueError(
                f"{key}: {shown(path)} is none of what is read: shards (*{SHARD_SUFFIX}), {', '.join(_FORMATS)}. Write "
                "its rows as one of these."
            )
        if is_packed(Path(shown(path)), _OF_FOLDERS):
            raise ValueError(f"{key}: {shown(path)} is compressed. Unpack it; Parquet is compressed inside.")
    (kind,) = kinds
    if kind is None:
        return Shards(pattern, tuple(paths))
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(_identity(path), path if is_url(path) else os.path.abspath(path))
    return Rows(pattern, kind, tuple(found.values()))


def _of_folder(pattern: str, folder: Path, split: str, key: str, default: str) -> Part:
    files, loop = _below(folder)
    shards = [file for file in files if file.name.endswith(SHARD_SUFFIX)]
    rows = [file for file in files if file.suffix.lower() in _OF_FOLDERS and not file.name.endswith(_OF_BUILDS)]
    if shards and rows:
        kind = "Parquet" if rows[0].suffix.lower() in PARQUET_SUFFIXES else "JSON Lines"
        raise ValueError(
            f"{key}: {folder} holds shards ({shards[0].name}) and {kind} ({rows[0].name}). Say which are meant by a "
            f"pattern, for example '{folder}/**/*{SHARD_SUFFIX}'."
        )
    suffixes = _OF_FOLDERS if rows else (SHARD_SUFFIX, *_OF_FOLDERS)  # beside rows a tar has their images
    packed = next((file for file in files if is_packed(file, suffixes)), None)
    if packed is not None:
        raise ValueError(
            f"{key}: {folder} holds compressed files, {packed.name} the first. Unpack them, or name files."
        )
    if not rows:
        if split or not shards:
            raise missing(key, pattern)
        return Shards(pattern, tuple(str(file) for file in shards))
    if loop is not None:
        raise ValueError(f"{key}: {loop} is a link to a folder that it lies in. Remove it, or name the files.")
    config, _, name = split.rpartition("/")
    chosen, note = _choose(splits_of(folder.absolute(), _absolute(rows), config), folder, name, default)
    if not chosen:
        raise ValueError(
            f"{key}: the card of {folder} names files of this split, and none of them is there. Get the data set again."
        )
    refuse_parts(folder, chosen)
    made = _of_one_kind(pattern, [str(file) for file in chosen], key)
    assert isinstance(made, Rows)
    note = note and f"{key}: {note}"
    return Rows(pattern, made.format, made.paths, str(folder.absolute()), note)


def _choose(splits: Splits, folder: Path, name: str, default: str) -> tuple[tuple[Path, ...], str]:
    """The files of a split, and what to tell where it was not asked for by name."""
    there = ", ".join(sorted(split or "files that name none" for split in splits))
    if name:
        meant = name if name in splits else SPLIT_NAMES.get(name.lower(), name)
        if meant not in splits:
            raise ValueError(
                f"{folder}: there is no split {name!r}: it has {there}. Write {folder}:SPLIT, or no split."
            )
        return splits[meant], f"{folder}: the split {name} is called {meant} there" if meant != name else ""
    if len(splits) == 1:
        (only,) = splits
        return splits[only], f"{folder}: its only split, {only}, is read" if only else ""
    if default not in splits:
        raise ValueError(f"{folder} has several splits ({there}). Say which is meant: {folder}:SPLIT.")
    return splits[default], f"{folder} has the splits {there}: {default} is read"


def _below(folder: Path) -> tuple[list[Path], Path | None]:
    """All files that are not hidden, sorted; links to folders are followed. And a link to a folder that it lies in."""
    found: list[Path] = []
    loop = None
    waiting: list[tuple[Path, tuple[str, ...]]] = [(folder, (os.path.realpath(folder),))]
    while waiting:
        here, around = waiting.pop()
        for entry in os.scandir(here):
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                found += [here / entry.name] if entry.is_file() or entry.is_symlink() else []  # a broken link is told
                continue
            real = os.path.realpath(entry.path)
            if real in around:
                loop = Path(entry.path)
            else:
                waiting.append((here / entry.name, (*around, real)))
    return sorted(found, key=str), loop


def _absolute(files: Sequence[Path]) -> list[Path]:
    return [file.absolute() for file in files]


def _format_of(path: str) -> RowFormat | None:
    """None of a shard, which may be called anything but what `_NOT_DATA` has."""
    return _FORMATS.get(_suffix_of(path))


def _suffix_of(path: str) -> str:
    name = urlsplit(same_file(path)).path if is_url(path) else path  # without the host, which has a suffix too
    return os.path.splitext(name)[1].lower()


def _identity(path: str) -> str:
    return same_file(path) if is_url(path) else os.path.realpath(path)
