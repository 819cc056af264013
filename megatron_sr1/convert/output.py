"""A result that appears under its name only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKS = ("config.json", "metadata.json")  # one of them lies in every checkpoint


@contextmanager
def complete_folder(out_dir: Path, source: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a folder to write to, which becomes `out_dir` at the end, or disappears where that is not reached.

    Raises:
        ValueError: `out_dir` exists, and may not or should not be replaced; it and `source` lie in each other.
    """
    partial = _prepare(out_dir, source, overwrite=overwrite)
    try:
        yield partial
        _commit(out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_of(out_dir: Path) -> Path:
    """Where a folder is made."""
    return out_dir.with_name(out_dir.name + ".partial")


def _prepare(out_dir: Path, source: Path, *, overwrite: bool) -> Path:
    """Clears what an interrupted run has left, and makes the folder to write to.

    Raises:
        ValueError: `out_dir` exists, and may not or should not be replaced.
    """
    resolved = out_dir.resolve()
    nested = source.resolve() in resolved.parents or resolved in source.resolve().parents
    if nested or resolved == source.resolve():
        raise ValueError(f"--out {out_dir} and {source} lie in each other. Choose another folder for the result.")
    if out_dir.exists():
        empty = out_dir.is_dir() and next(out_dir.iterdir(), None) is None
        checkpoint = out_dir.is_dir() and any((out_dir / mark).is_file() for mark in MARKS)
        if not empty and not overwrite:
            raise ValueError(f"--out {out_dir} exists. Give --overwrite to replace it, or choose another folder.")
        if not empty and not checkpoint:
            raise ValueError(f"--out {out_dir} holds no checkpoint, so it is not replaced. Choose another folder.")
    partial = _partial_of(out_dir)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _commit(out_dir: Path) -> None:
    """Gives a complete folder its name; what had the name before is removed last."""
    old = out_dir.with_name(out_dir.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    _partial_of(out_dir).rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
