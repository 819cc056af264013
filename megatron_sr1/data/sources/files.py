"""The files of a data set, names for their samples, and paths that stay inside a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.data.patterns import matching

_OFSPLIT_NAMES = {
    "train": "train training", "test": "test testing testmini minitest", "validation": "validation valid val dev eval",
    "heldout": "heldout",
}  # fmt: skip
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
SPLIT_NAMES = {word: split for split, words in _OFSPLIT_NAMES.items() for word in words.split()}


def find_files(path: str, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """The files of a path, a folder (searched deeply, hidden folders left out) or a glob pattern, sorted.

    Raises:
        ValueError: nothing is there, a folder mixes splits (a test set must not slip into training), or holds
            compressed files that would be passed over.
    """
    there = matching(path)
    root = Path(there[0] if len(there) == 1 else path)
    if root.is_file():
        return (root,)
    within = root.is_dir()
    files = [Path(file) for file in there] if not within else _below(root)
    found = [file for file in files if file.suffix.lower() in suffixes]
    packed = [file for file in files if is_packed(file, suffixes)]
    if found and packed:
        raise ValueError(
            f"{path} holds {len(packed)} compressed files beside what is read, {packed[0].name} the first. Unpack "
            f"them, or say which are meant by a pattern in quotes, for example '{root / '**' / ('*' + suffixes[0])}'."
        )
    splits = {split_of(file.relative_to(root)): file for file in reversed(found)} if within else {}
    if len(splits) > 1 and splits.keys() != {None, "train"}:
        kinds = ", ".join(f"{split or 'no split'} in {splits[split].name}" for split in sorted(splits, key=str))
        raise ValueError(
            f"{path} holds several splits ({kinds}). Build one at a time: give a pattern in quotes, for example "
            f"'{root / '**' / 'train*'}'."
        )
    if not found:
        raise ValueError(f"{path} holds no file that ends with {' or '.join(suffixes)}. Correct --input or --format.")
    return tuple(found)


def _below(root: Path) -> list[Path]:
    found = (file for file in sorted(root.rglob("*")) if not _is_hidden(file.relative_to(root)))
    return [file for file in found if file.is_file()]


def is_packed(file: Path, suffixes: Sequence[str]) -> bool:
    """Whether it is a compressed file of such a kind: rows.jsonl.gz, a.tar.zst, a.tgz."""
    name = file.name.lower()
    return any(name.endswith(f"{suffix}{packed}") for suffix in suffixes for packed in _PACKED) or (
        ".tar" in suffixes and file.suffix.lower() == ".tgz"
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def split_of(path: Path) -> str | None:
    """The split that a relative path names, or None: train-00000-of-00007.parquet, train/0000.parquet, geo_train.jsonl,
    train2014.json -> train. The innermost name counts."""
    for name in (path.stem, *(folder.name for folder in path.parents)):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return None


def key_prefixes(files: Sequence[Path], before: str = "") -> dict[Path, str]:
    """A distinct beginning of the keys for every file: `before` and its name without suffix, dots replaced; numbered
    where equal."""
    prefixes: dict[Path, str] = {}
    taken: set[str] = set()
    for number, file in enumerate(files):
        prefix = file.stem.replace(".", "_")
        if prefix in taken:
            prefix = f"{number:05d}-{prefix}"
        taken.add(prefix)
        prefixes[file] = before + prefix
    return prefixes


def inside(root: Path, name: str) -> Path:
    """root/name, or the name itself where it is absolute and below `root`. Raises ValueError where the name leads out
    of it: data must not name any file of the machine.

    Links are followed: who put one into the folder meant it, as the cache of Hugging Face downloads does.
    """
    path, top = (Path(os.path.abspath(each)) for each in (root / name, root))
    if not path.is_relative_to(top):
        raise ValueError(f"{name!r} leads outside of {root}")
    return path if os.path.isabs(name) else Path(os.path.normpath(root / name))
