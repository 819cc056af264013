"""Whether a process of this machine is still there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

GONE = ("", "Z")  # states of a process that does nothing any more


def place() -> tuple[str, str]:
    """This machine, and which processes this one sees there. Its name may be that of others, its boot is its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return socket.gethostname(), f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname(), ""


def state_of(host: str, namespace: str, process_id: int, began: str = "") -> str:
    """As in proc(5), "R", "S", "T" and so on; "": it is gone; "?": it cannot be seen from here.

    Args:
        host, namespace: see `place`.
        began: see `began_at`: another process that has the number by now is not it. "": nobody has asked then.
    """
    if not namespace or (host, namespace) != place():
        return "?"
    try:
        fields = _stat(process_id)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return "?"
    return "" if began and fields[_START] != began else fields[_STATE]


def began_at(process_id: int) -> str:
    """When a process of this machine began, in ticks since the machine did; "" where that cannot be known."""
    try:
        return _stat(process_id)[_START]
    except OSError:
        return ""


_STATE, _START = 0, 19  # of the fields behind the name: the third and the 22nd of proc(5)


def _stat(process_id: int) -> list[str]:
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
