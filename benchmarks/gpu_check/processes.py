"""One command in a process group of its own, ended with all it has started when its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL


def run_limited(
    command: Sequence[str], log: Path, limit_s: float, cwd: Path, environment: Mapping[str, str] | None = None
) -> int | None:
    """Its exit status; None: it was ended after `limit_s` seconds. What it prints goes to `log`.

    However it ends, also by an exception here, nothing of its group stays.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so Ctrl-C reaches this process alone, which then ends the group
        )
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks what is left of the group to end, and kills what does not."""
    if not _signal(process.pid, signal.SIGTERM):
        return
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end:
        process.poll()  # a child that nobody has waited for still counts
        if not _signal(process.pid, 0):
            return
        time.sleep(0.05)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> bool:
    """Whether there is still somebody in the group."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
