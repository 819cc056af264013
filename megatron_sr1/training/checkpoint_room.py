"""Is there room for one more checkpoint? Asked before it is written, and of the next one as soon as one is whole.

What a checkpoint takes is known to the byte from what its ranks have copied, but for its headers. The oldest are
removed when a new one is whole; where that is too late, what it would remove makes room before, but never the newest.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def make_room(folder: Path, num_bytes: int, partial: Path, surplus: Callable[[], Sequence[Path]]) -> None:
    """
    Args:
        partial: where it will be written, which is removed where it cannot be.
        surplus: gives the checkpoints that it will leave to be removed, oldest first.

    Raises:
        ValueError: there is no room for so many bytes, also without the surplus.
    """
    free = shutil.disk_usage(folder).free
    for old in surplus() if free < num_bytes else ():
        _say(f"{folder}: the next checkpoint takes {in_mib(num_bytes)}, {in_mib(free)} are free: {old.name} is removed")
        remove_checkpoint(old)
        free = shutil.disk_usage(folder).free
        if free >= num_bytes:
            return
    if free < num_bytes:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(no_space(partial.with_suffix(""), num_bytes, free))


def warn_of_next(folder: Path, num_bytes: int, surplus: Callable[[], Sequence[Path]]) -> None:
    """Says on standard error where another one of so many bytes will find no room."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes and free + sum(map(_size, surplus())) < num_bytes:
        _say(f"warning: {folder}: the next checkpoint needs {in_mib(num_bytes)}, {in_mib(free)} are free. Make room.")


def no_space(path: Path, num_bytes: int, free: int) -> str:
    """The complaint that a checkpoint of so many bytes could not be written."""
    return (
        f"no space left on {path.parent}: {in_mib(free)} free, and {path.name} takes {in_mib(num_bytes)}. Make room, "
        "or lower train.keep_checkpoints; the same command goes on from the checkpoint before."
    )


def in_mib(num_bytes: int) -> str:
    """12 MiB; a tenth of it below ten."""
    mib = num_bytes / 2**20
    return f"{mib:.1f} MiB" if mib < 10 else f"{mib:.0f} MiB"


def remove_checkpoint(path: Path) -> None:
    """A kill leaves nothing of its name."""
    removed = path.with_suffix(".partial-removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
