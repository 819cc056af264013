"""Folders of Hugging Face data sets: which files are which split.

As `snapshot_download` and `git clone` leave them the card (README.md) may say it, in `configs:` with `data_files:`;
else the names of files and folders do (data/train-00000-of-00002.parquet, test/0.jsonl). A folder that
`datasets.save_to_disk` wrote says it in dataset_dict.json and state.json.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sr1.config.data_suffixes import JSONL_SUFFIXES, PARQUET_SUFFIXES
from megatron_sr1.data.sources.files import inside, split_of

Splits = Mapping[str, tuple[Path, ...]]  # files by split; "": files that name none; no files: they were not fetched
_CARD = "README.md"
_DICT, _STATE = "dataset_dict.json", "state.json"
_NUMBERED = re.compile(r"(\w[\w.-]*)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")
_ROWS = (*PARQUET_SUFFIXES, *JSONL_SUFFIXES)


def splits_of(folder: Path, files: Sequence[Path], config: str) -> Splits:
    """The splits of a data set.

    Args:
        files: all Parquet, Arrow and JSON Lines files in and below the folder, sorted.
        config: of those that its card names; "": its only one, or its default.

    Raises:
        ValueError: the card or the state is damaged, names no such configuration, files that are not there, or files
            of other kinds.
    """
    if (folder / _DICT).is_file() or (folder / _STATE).is_file():
        _refuse_config(folder, config, ())
        return _saved(folder)
    configs = _configs_of_card(folder)
    if not configs:
        _refuse_config(folder, config, ())
        return _by_names(folder, files)
    name = config or _default_config(folder, configs)
    _refuse_config(folder, name, tuple(configs))
    return _of_config(folder, files, configs[name])


def _refuse_config(folder: Path, config: str, known: Sequence[str]) -> None:
    if config and config not in known:
        there = f"it has {', '.join(known)}" if known else "it names none"
        raise ValueError(f"{folder}: there is no configuration {config!r}: {there}. Write {folder}:SPLIT.")


def _saved(folder: Path) -> Splits:
    if not (folder / _DICT).is_file():
        state, files = _state(folder)
        return {str(state.get("_split") or ""): files}
    names = _json_object(folder / _DICT).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / _DICT}: it names no splits. The data set is damaged: save it again.")
    return {name: _state(inside(folder, name))[1] for name in names}


def _state(folder: Path) -> tuple[Mapping[str, Any], tuple[Path, ...]]:
    """What `save_to_disk` notes of one split, and its files: no others, which may be caches, are read."""
    state = _json_object(folder / _STATE)
    listed = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed or ()]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / _STATE}: it names no data files. The data set is damaged: save it again.")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError(f"{folder}: it was saved with a selection of rows: call flatten_indices() and save it again.")
    files = tuple(inside(folder, str(name)) for name in names)
    return state, _there(files, folder / _STATE)


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it cannot be read ({error}). The data set is damaged: get it again.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: it is no JSON object. The data set is damaged: get it again.")
    return tree


def _there(files: tuple[Path, ...], named_by: Path) -> tuple[Path, ...]:
    absent = next((file for file in files if not file.is_file()), None)
    if absent is not None:
        raise ValueError(f"{absent}: {named_by} names this file, and it is not there. Get the data set again.")
    return files


def _configs_of_card(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The configurations that say where their files are, by name."""
    card = folder / _CARD
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    head = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    if head is None or "configs:" not in head[1]:
        return {}
    try:
        front = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise ValueError(f"{card}: what stands between its lines --- is no YAML ({error}). Correct it.") from error
    listed = front.get("configs") if isinstance(front, dict) else None
    configs = {}
    for config in listed if isinstance(listed, list) else ():
        name = config.get("config_name", "default") if isinstance(config, dict) else None
        if not isinstance(name, str) or name in configs:
            raise ValueError(f"{card}: its configs must be a list of mappings, each with its config_name. Correct it.")
        if config.get("data_files") or config.get("data_dir"):
            configs[name] = config
    return configs


def _default_config(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> str:
    marked = [name for name, config in configs.items() if config.get("default") is True]
    named = marked or [name for name in configs if name == "default" or len(configs) == 1]
    if len(named) != 1:
        raise ValueError(
            f"{folder} has several configurations ({', '.join(configs)}). Say which: {folder}:CONFIGURATION/SPLIT."
        )
    return named[0]


def _of_config(folder: Path, files: Sequence[Path], config: Mapping[str, Any]) -> Splits:
    card = folder / _CARD
    base = inside(folder, str(config["data_dir"])) if config.get("data_dir") else folder
    patterns = config.get("data_files")
    if not patterns:
        return _by_names(base, [file for file in files if file.is_relative_to(base)])
    if isinstance(patterns, str) or (isinstance(patterns, list) and all(isinstance(one, str) for one in patterns)):
        patterns = [{"split": "train", "path": patterns}]
    splits: dict[str, tuple[Path, ...]] = {}
    for entry in patterns if isinstance(patterns, list) else ():
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(split, str) or split in splits or not isinstance(paths, list) or not paths:
            raise ValueError(f"{card}: its data_files must be a list of {{split, path}}, each split once. Correct it.")
        splits[split] = _matching(base, [str(path) for path in paths], card, len(patterns))
    if not splits:
        raise ValueError(f"{card}: its data_files must be a list of {{split, path}}. Correct it.")
    return splits


def _matching(base: Path, patterns: Sequence[str], card: Path, num_splits: int) -> tuple[Path, ...]:
    """The files of a split; of one of several, none where nothing of it was fetched."""
    found: dict[Path, None] = {}
    absent = ""
    for pattern in patterns:
        inside(base, pattern)  # refuses what leads out
        names = sorted(glob.glob(pattern, root_dir=base, recursive=True))
        files = [base / name for name in names if (base / name).is_file()]
        absent = absent or ("" if files else pattern)
        found |= dict.fromkeys(files)
    if absent and (found or num_splits == 1):
        raise ValueError(f"{card}: its data_files name {absent!r}, and no such file is in {base}. Get it again.")
    strange = next((file for file in found if file.suffix.lower() not in _ROWS), None)
    if strange is not None:
        raise ValueError(
            f"{strange}: {card} names this file, and it is none of {', '.join(_ROWS)}. Name the files that you mean."
        )
    return tuple(found)


def _by_names(base: Path, files: Sequence[Path]) -> Splits:
    splits: dict[str, list[Path]] = {}
    for file in files:
        numbered, word = _NUMBERED.fullmatch(file.stem), split_of(file.relative_to(base))
        splits.setdefault((numbered[1] if numbered and numbered[1] != "data" else word) or "", []).append(file)
    if "" in splits and len(splits) > 1:
        others = ", ".join(sorted(splits.keys() - {""}))
        raise ValueError(
            f"{base} has files of splits ({others}), and {splits[''][0].name}, which names none. Give the files that "
            "you mean by a pattern."
        )
    return {split: tuple(found) for split, found in splits.items()}


def refuse_parts(folder: Path, files: Sequence[Path]) -> None:
    """Raises ValueError where NAME-00000-of-00002 stand for one split in several folders, or some of them are missing.

    Folders that each have a whole split are configurations (en, de): which is meant, only a card could say.
    """
    parts: dict[tuple[Path, str, str], set[str]] = {}
    for file in files:
        if found := _NUMBERED.fullmatch(file.stem):
            name, number, total = found.groups()
            parts.setdefault((file.parent, name, total), set()).add(number)
    for (parent, name, total), numbers in parts.items():
        absent = next((n for n in range(int(total)) if f"{n:05d}" not in numbers), None)
        if absent is not None:
            raise ValueError(
                f"{parent} has {len(numbers)} of {int(total)} files {name}-*-of-{total}: {name}-{absent:05d}-of-"
                f"{total} is not there. Get the data set again, or name the files that you mean by a pattern."
            )
    parents = list(dict.fromkeys(parent for parent, _, _ in parts))
    if len(parents) > 1:
        listed, example = ", ".join(map(str, parents)), parents[0] / f"{next(iter(parts))[1]}-*{files[0].suffix}"
        raise ValueError(
            f"{folder} has files of one split in several folders ({listed}), and no card that says which are meant. "
            f"Write each that you mean as an entry: {example}."
        )
