"""Shards behind URLs: opened by webdataset's own openers (curl, gsutil, ais ...), kept in a folder on this machine.

`s3://` has no opener of its own there; it becomes webdataset's `pipe:` to the aws command, as its documentation does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20  # bytes


def is_url(pattern: str) -> bool:
    """Whether a shard is read through an opener, not as a local file."""
    return "://" in pattern


def expand_url(pattern: str) -> list[str]:
    """`https://host/train-{00000..00007}.tar` -> eight URLs; others stay as they are."""
    from braceexpand import braceexpand

    return list(braceexpand(pattern))


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """Raises OSError where the opener fails, also at the end."""
    from webdataset.gopen import gopen  # here, because it imports torch, which local shards do not need

    command = f"pipe:aws s3 cp --no-progress {shlex.quote(url)} -"
    opener: Any = gopen  # its pipes are files in all that is asked of them here
    with opener(command if url.startswith("s3://") else url) as stream:
        yield stream


class ShardCache:
    """A folder of downloaded shards, shared by the ranks of a machine; the least recently used make room."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: of all shards together; the newest one stays even where it alone is larger."""
        self._folder = folder
        self._max_bytes = max_bytes

    def read_whole(self, url: str) -> bytes:
        """The bytes behind a URL, not kept. Raises OSError where it cannot be read."""
        with _opened(url) as stream:
            return stream.read()

    def check(self, url: str) -> None:
        """Reads the first bytes of a shard, to find out at start-up that it is missing.

        Raises:
            ValueError: it cannot be opened, or is empty.
        """
        try:
            with _opened(url) as stream:
                found = stream.read(512)
        except OSError as error:
            raise ValueError(
                f"{url}: the shard cannot be opened ({error}). Correct the URL, or upload the shard."
            ) from error
        if not found:
            raise ValueError(f"{url}: the shard is empty. Upload it again.")

    def fetch(self, url: str, version: str = "") -> Path:
        """The local copy of a shard, downloaded where it is missing. Safe to call from many threads and processes.

        Args:
            version: tells shards apart that stood behind the URL at different times; "": there is only one.

        Raises:
            OSError: the download failed.
        """
        path = self._path(url, version)
        try:
            os.utime(path)  # the time of the last use
            return path
        except FileNotFoundError:
            self._folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # nobody else was faster
                self._download(url, path)
                self._make_room(path)
        return path

    def _path(self, url: str, version: str) -> Path:
        return self._folder / f"{hashlib.sha256(f'{version} {url}'.encode()).hexdigest()[:32]}.tar"

    def _download(self, url: str, path: Path) -> None:
        partial = path.with_suffix(".partial")  # one at a time: the lock is ours
        with _opened(url) as stream, partial.open("wb") as file:
            while data := stream.read(_CHUNK):
                file.write(data)
        os.replace(partial, path)

    def _make_room(self, newest: Path) -> None:
        """Removes the least recently used shards. Whoever has one open can go on reading it."""
        used = []
        for path in self._folder.glob("*.tar"):
            try:
                used.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process made room
                continue
        total = sum(size for _, size, _ in used)
        for _, size, path in sorted(used):
            if total <= self._max_bytes:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size
