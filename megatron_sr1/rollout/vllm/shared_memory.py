"""The memory through which an engine's ranks reduce on a CPU: named after the job, and nameless as soon as all have it.

A name outlives every process. So it is taken back when the engine has started; what a start that was killed has left is
taken back by the next one on the machine.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path("/dev/shm")
_PREFIX = "megatron_sr1"
_NAME = re.compile(rf"{_PREFIX}-\d+-(\d+)-[0-9a-f]+-")


def new_job() -> str:
    """A name for the memory of a job, of which this process is one."""
    return f"{_PREFIX}-{_namespace()}-{os.getpid()}-{secrets.token_hex(8)}"


def take_back(groups: Iterable[str]) -> None:
    """The names of the memory of groups of ranks, which lives as long as somebody has it: a rank's each."""
    if _FOLDER.is_dir():
        for group in groups:
            for path in _FOLDER.glob(f"{group}_*"):
                path.unlink(missing_ok=True)


def take_back_left_behind() -> None:
    """The names of jobs whose first process is gone, and was one that could be seen from here."""
    if not _FOLDER.is_dir():
        return
    for path in _FOLDER.glob(f"{_PREFIX}-{_namespace()}-*"):
        found = _NAME.match(path.name)
        if found is not None and not Path(f"/proc/{found[1]}").exists():
            try:
                path.unlink(missing_ok=True)
            except PermissionError:  # another user's
                continue


def _namespace() -> int:
    """Of process ids: those of another container, or of another machine, mean nothing here."""
    try:
        number = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        number = 0
    return zlib.crc32(f"{socket.gethostname()} {number}".encode())
