"""Shards behind URLs: read as `file_systems` does, kept in a folder on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from megatron_sr1.data.commands import output_of
from megatron_sr1.data.file_systems import download, read_all, read_beginning
from megatron_sr1.data.remote_errors import RemoteError
from megatron_sr1.data.urls import protocol_of, same_file, shown
from megatron_sr1.file_lock import lock_file

_CHUNK = 1 << 20  # bytes
_TAR_BLOCK = 512  # bytes


class ShardCache:
    """A folder of downloaded shards, shared by the ranks of a machine; the least recently used make room."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: of all shards together; the newest one stays even where it alone is larger."""
        self._folder = folder
        self._max_bytes = max_bytes

    def read_index(self, url: str) -> bytes:
        """The bytes of the index behind a URL, not kept; none where the server has no such file, or shows it to nobody:
        a presigned URL is that of the shard alone.

        Raises:
            RemoteError: it may be there, and could not be read.
        """
        try:
            if protocol_of(url) == "pipe":
                with output_of(url) as stream:
                    return stream.read()
            return read_all(url)
        except RemoteError as error:
            if not error.refused:
                raise
            return b""

    def check(self, url: str) -> None:
        """Reads the first bytes of a shard, to find out at start-up that it is missing.

        Raises:
            ValueError: it cannot be opened, or is empty.
        """
        try:
            found = _beginning(url)
        except RemoteError as error:
            raise ValueError(
                f"{shown(url)}: the shard cannot be opened ({error}). Correct the URL, or upload the shard."
            ) from error
        if not found:
            raise ValueError(f"{shown(url)}: the shard is empty. Upload it again.")

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
        with lock_file(path.with_suffix(".lock"), wait=True):
            if not path.exists():  # nobody else was faster
                self._download(url, path)
                self._make_room(path)
        return path

    def _path(self, url: str, version: str) -> Path:
        return self._folder / f"{hashlib.sha256(f'{version} {same_file(url)}'.encode()).hexdigest()[:32]}.tar"

    def _download(self, url: str, path: Path) -> None:
        partial = path.with_suffix(".partial")  # one at a time: the lock is ours
        if protocol_of(url) == "pipe":
            with output_of(url) as stream, partial.open("wb") as file:
                shutil.copyfileobj(stream, file, _CHUNK)
        else:
            download(url, partial)
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


def _beginning(url: str) -> bytes:
    if protocol_of(url) != "pipe":
        return read_beginning(url, _TAR_BLOCK)
    with output_of(url) as stream:
        return stream.read(_TAR_BLOCK)
