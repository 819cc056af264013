"""The processes of one started command, wherever they have gone, and what it leaves on the machine."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from tests.workspace import REPOSITORY

MARK = "MEGATRON_SR1_TRIED"  # in the environment, which every process inherits, whoever adopts it
SHARED_MEMORY = Path("/dev/shm")
GONE = (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied)


class Started:
    """A command in a session of its own, with all processes that it has started."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.mark = secrets.token_hex(8)
        self._ids: set[int] = set()  # of all that were seen
        self._before = {path.name for path in SHARED_MEMORY.iterdir()}
        self._out: IO[str] = log.open("w")
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=self._out, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.log = log

    def alive(self) -> dict[int, psutil.Process]:
        """All that are not dead, by id."""
        found = {}
        for process in psutil.process_iter():
            with suppress(*GONE):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
        self._ids |= found.keys()
        return found

    def roles(self) -> dict[str, list[psutil.Process]]:
        """Those that are alive, by what they are for."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.alive().values():
            with suppress(*GONE):
                found.setdefault(self._role(process), []).append(process)
        return found

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self.process.pid:
            return "launcher"
        words, parent = " ".join(process.cmdline()), process.parent()
        above = "" if parent is None else " ".join(parent.cmdline())
        if "resource_tracker" in words:
            return "resource tracker"
        if "spawn_main" in words:
            return "child of a grader" if "spawn_main" in above else "grader"
        if "forkserver" in words:
            return "rank" if "forkserver" in above else "fork server"
        return "other"

    def ended_within(self, seconds: float) -> float | None:
        """After how many seconds from now nothing is left; None: something is."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if self.process.poll() is not None and not self.alive():
                return time.monotonic() - start
            time.sleep(0.05)
        return None

    def left_in_memory(self) -> list[str]:
        """Names in /dev/shm that a process of the command has left: each is named after one."""
        names = {path.name for path in SHARED_MEMORY.iterdir()} - self._before
        return sorted(name for name in names if self._ids & set(map(int, re.findall(r"\d+", name))))

    def close(self) -> int:
        """Kills what is left; the command's status."""
        for process in self.alive().values():
            with suppress(*GONE):
                process.kill()
        status = self.process.wait()
        self._out.close()
        return status
