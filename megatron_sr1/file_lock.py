"""Keeps other processes out of a folder while this one works there, on every file system."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_POLL_SECONDS = 0.2


@contextmanager
def lock_file(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether the lock is this process's, which it then is until the end. A killed process leaves no lock behind.

    Where the file system has no flock, as some network and object stores, a warning says so and a file beside `path`
    names the machine and the process that hold the lock; it is taken over from a process of this machine that is gone.

    Args:
        wait: until it is free.
    """
    with path.open("w") as file:
        try:
            held = _flock(file, wait)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
        else:
            yield held  # closing the file gives it back
            return
    owner = path.with_name(f"{path.name}.owner")
    warnings.warn(f"{path.parent} is on a file system without flock: {owner} is the lock instead", stacklevel=3)
    held = _create(owner)
    while wait and not held:
        time.sleep(_POLL_SECONDS)
        held = _create(owner)
    try:
        yield held
    finally:
        if held:
            owner.unlink(missing_ok=True)


def _flock(file: IO[str], wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _create(owner: Path) -> bool:
    """Whether the file is now this process's."""
    try:
        descriptor = os.open(owner, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less the umask
    except FileExistsError:
        return _take_over(owner) and _create(owner)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
    return True


def _take_over(owner: Path) -> bool:
    """Removes the file of a process of this machine that is gone. Of several that try, renaming lets one."""
    try:
        text = owner.read_text()
        if not _is_gone(text):
            return False
        aside = owner.with_name(f"{owner.name}.{os.getpid()}")
        owner.rename(aside)
        if aside.read_text() != text:  # somebody was faster, and this is their lock
            aside.rename(owner)
            return False
        aside.unlink()
    except FileNotFoundError:  # given back or taken over just now
        pass
    return True


def _is_gone(text: str) -> bool:
    host, _, number = text.strip().rpartition(" ")
    if host != socket.gethostname() or not number.isdecimal():
        return False  # nothing is known of another machine's processes
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False
