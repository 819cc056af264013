"""`pipe:COMMAND`: a shard that a program of the user's own writes to its output."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from megatron_sr1.data.remote_errors import RemoteError
from megatron_sr1.data.urls import shown


@contextmanager
def output_of(url: str) -> Iterator[IO[bytes]]:
    """What the command prints. Whoever does not read it to its end is not told how it ends.

    Raises:
        RemoteError: the command failed. Its line, with whatever signs a URL in it, is not repeated.
    """
    command = url.removeprefix("pipe:")
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
        is_read = not process.stdout.read(1)
    if is_read and process.returncode:
        ended = f"the program that reads it ended with exit {process.returncode}"
        raise RemoteError(f"{shown(url)}: {ended}", refused=True)
