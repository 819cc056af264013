"""Folders that appear under their name only when they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

_MARKS = ("config.json", "metadata.json")  # one of them lies in every checkpoint


def partial_of(out_dir: Path) -> Path:
    """Where a folder is made."""
    return out_dir.with_name(out_dir.name + ".partial")


def prepare(out_dir: Path, sources: Iterable[Path], *, overwrite: bool) -> Path:
    """Clears what an interrupted run has left, and makes the folder to write to.

    Raises:
        ValueError: `out_dir` exists, and may not or should not be replaced.
    """
    resolved = out_dir.resolve()
    for source in sources:
        inside = resolved == source.resolve() or resolved in source.resolve().parents
        if inside or source.resolve() in resolved.parents:
            raise ValueError(f"--out {out_dir} and {source} lie in each other. Choose another folder for the result.")
    if out_dir.exists():
        empty = out_dir.is_dir() and next(out_dir.iterdir(), None) is None
        checkpoint = out_dir.is_dir() and any((out_dir / mark).is_file() for mark in _MARKS)
        if not empty and not overwrite:
            raise ValueError(f"--out {out_dir} exists. Give --overwrite to replace it, or choose another folder.")
        if not empty and not checkpoint:
            raise ValueError(f"--out {out_dir} holds no checkpoint, so it is not replaced. Choose another folder.")
    partial = partial_of(out_dir)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit(out_dir: Path) -> None:
    """Gives a complete folder its name; what had the name before is removed last."""
    old = out_dir.with_name(out_dir.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial_of(out_dir).rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
