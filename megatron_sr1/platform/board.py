"""A few short texts that all ranks of a job can read while their main threads wait for each other."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from torch.distributed import (
    FileStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
)

from megatron_sr1.platform.torch_private import job_store_copy

STORE_SECONDS = 20.0  # that the store of the job may take for a text that is there
CAUSE = "cause"  # why the ranks end


class Board(Protocol):
    """Texts by name."""

    outlives: bool  # rank 0, which keeps it otherwise

    def write(self, name: str, text: str) -> None: ...

    def read(self, name: str) -> str | None: ...

    def write_first(self, name: str, text: str) -> None:
        """Unless there is one already."""
        ...


class FolderBoard:
    """Of ranks on one machine, which share a folder of their own."""

    outlives = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, name: str, text: str) -> None:
        path = self._folder / name
        new = path.with_name(f"{name}.new.{os.getpid()}.{threading.get_ident()}")
        new.write_text(text, encoding="utf-8")
        new.rename(path)

    def read(self, name: str) -> str | None:
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write_first(self, name: str, text: str) -> None:
        new = self._folder / f"{name}.first.{os.getpid()}"
        new.write_text(text, encoding="utf-8")
        with suppress(FileExistsError):
            os.link(new, self._folder / name)
        new.unlink()


class StoreBoard:
    """Of ranks on several machines: on the store through which they have met, over a connection of its own."""

    outlives = False

    def __init__(self, store: Store) -> None:
        self._store = store
        self._store.set_timeout(timedelta(seconds=STORE_SECONDS))

    def write(self, name: str, text: str) -> None:
        self._store.set(f"board/{name}", text)

    def read(self, name: str) -> str | None:
        key = f"board/{name}"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def write_first(self, name: str, text: str) -> None:
        self._store.compare_set(f"board/{name}", "", text)


def job_board(world_size: int) -> Board | None:
    """None: this rank is alone."""
    if world_size == 1:
        return None
    store = job_store_copy()
    if not isinstance(store, FileStore):
        return StoreBoard(store)
    in_file: Any = store
    return FolderBoard(Path(in_file.path).parent)
