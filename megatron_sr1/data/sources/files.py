"""The files of a data set, names for their samples, and paths that stay inside a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_sr1.data.patterns import matching

_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "heldout")


def find_files(path: str, suffixes: Sequence[str]) -> tuple[Path, ...]:
    """The files of a path, a folder (searched deeply, hidden folders left out) or a glob pattern, sorted.

    Raises:
        ValueError: nothing is there, or a folder mixes splits: a test set must not slip into training.
    """
    there = matching(path)
    root = Path(there[0] if len(there) == 1 else path)
    if root.is_file():
        return (root,)
    if root.is_dir():
        found = [
            file
            for file in sorted(root.rglob("*"))
            if file.suffix in suffixes and file.is_file() and not _is_hidden(file.relative_to(root))
        ]
        splits = sorted({split for split in map(_split_of, found) if split is not None})
        if len(splits) > 1:
            raise ValueError(
                f"{path} holds several splits ({', '.join(splits)}). Build one at a time: give a pattern in quotes, "
                f"for example '{root / '**' / (splits[-1] + '*')}'."
            )
    else:
        found = [Path(file) for file in there if Path(file).suffix in suffixes]
    if not found:
        raise ValueError(f"{path} holds no file that ends with {' or '.join(suffixes)}. Correct --input or --format.")
    return tuple(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path) -> str | None:
    """train-00000-of-00007.parquet, train/0000.parquet -> train."""
    for name in (path.stem, path.parent.name):
        first = name.replace("_", "-").split("-")[0].lower()
        if first in _SPLITS:
            return first
    return None


def key_prefixes(files: Sequence[Path]) -> dict[Path, str]:
    """A distinct beginning of the keys for every file: its name without suffix, dots replaced; numbered where equal."""
    prefixes: dict[Path, str] = {}
    taken: set[str] = set()
    for number, file in enumerate(files):
        prefix = file.stem.replace(".", "_")
        if prefix in taken:
            prefix = f"{number:05d}-{prefix}"
        taken.add(prefix)
        prefixes[file] = prefix
    return prefixes


def inside(root: Path, name: str) -> Path:
    """root/name. Raises ValueError where the name leads out of `root`: data must not name any file of the machine.

    Links are followed: who put one into the folder meant it, as the cache of Hugging Face downloads does.
    """
    path = os.path.normpath(root / name)
    if os.path.isabs(name) or not Path(path).is_relative_to(os.path.normpath(root)):
        raise ValueError(f"{name!r} leads outside of {root}")
    return Path(path)
