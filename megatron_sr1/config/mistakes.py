"""Errors that a person can put right: each becomes one line."""

from __future__ import annotations

import errno

from megatron_sr1.config.credentials import without_queries

EXPECTED_ERRORS = (ValueError, OSError)
MISTAKE_STATUS = 2  # of a command that ends with such a line
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a limit on files
_REMEDIES = {
    **dict.fromkeys(FULL, "Make room there, then give the same command again: it goes on from what is saved"),
    errno.EACCES: "Choose a path that this user may use",
    errno.EPERM: "Choose a path that this user may use",
    errno.EROFS: "Choose a path that can be written to",
    errno.ENOENT: "Correct the path",
    errno.ENOTDIR: "Correct the path: a file stands where it wants a folder",
    errno.EISDIR: "Correct the path: a folder stands where it wants a file",
    errno.EEXIST: "Move away what is there",
}


def one_line(error: BaseException) -> str:
    """What, where, what to do. URLs lose their queries, which may be signatures."""
    return without_queries(_line(error))


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{where}{error.strerror}." + (f" {remedy}." if remedy else "")
    return " ".join(str(error).split()) or type(error).__name__
