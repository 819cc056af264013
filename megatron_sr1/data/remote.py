"""Shards behind URLs: opened by webdataset's own openers (curl, gsutil, ais ...), kept in a folder on this machine.

`s3://` has no opener of its own there; it becomes webdataset's `pipe:` to the aws command, as its documentation does.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_sr1.data.urls import same_file, shown
from megatron_sr1.file_lock import lock_file

_CHUNK = 1 << 20  # bytes
_EXIT = re.compile(r"exit (-?\d+) \(read\)")  # at the end of what webdataset says of a command that failed
_CURL_HTTP_ERROR = 22  # curl's exit status where the server answers 400 or more
_ANSWER_SECONDS = 30


class OpenerError(OSError):
    """The program that reads a URL failed. Its command line, with whatever signs the URL, is not repeated."""

    def __init__(self, status: int, url: str) -> None:
        super().__init__(f"{shown(url)}: the program that reads it ended with exit {status}")
        self.status = status


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    """Raises OpenerError where the opener fails, also at the end; ValueError where there is none."""
    from webdataset.gopen import gopen  # here, because it imports torch, which local shards do not need

    command = f"pipe:aws s3 cp --no-progress {shlex.quote(url)} -"
    opener: Any = gopen  # its pipes are files in all that is asked of them here
    try:
        opened = opener(command if url.startswith("s3://") else url)
    except ValueError:
        raise ValueError(f"{shown(url)}: nothing here opens such a URL. Give https:// or s3://.") from None
    try:
        with opened as stream:
            yield stream
    except OSError as error:
        status = _EXIT.search(str(error))
        if status is None:
            raise
        raise OpenerError(int(status[1]), url) from None


def _why(url: str, error: OSError) -> str:
    """What is wrong with a URL whose opener failed: curl is asked once more, for the status that it did not tell."""
    if not isinstance(error, OpenerError) or error.status != _CURL_HTTP_ERROR:
        return str(error)
    quoted = url.replace("\\", "\\\\").replace('"', '\\"')
    asked = ("curl", "--silent", "--location", "--range", "0-0", "--max-time", str(_ANSWER_SECONDS))
    printed = ("--output", os.devnull, "--write-out", "%{http_code}", "--config", "-")
    config = f'url = "{quoted}"\n'  # not an argument, which every user of the machine can see
    found = subprocess.run((*asked, *printed), input=config, capture_output=True, text=True, check=False)
    renew = ": renew its signature, or its token" if found.stdout in ("401", "403") else ""
    return f"HTTP {found.stdout} for {shown(url)}{renew}"


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
                f"{shown(url)}: the shard cannot be opened ({_why(url, error)}). Correct the URL, or upload the shard."
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
        try:
            with _opened(url) as stream, partial.open("wb") as file:
                while data := stream.read(_CHUNK):
                    file.write(data)
        except OpenerError as error:
            raise OSError(_why(url, error)) from error
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
