"""When a fault comes: at a random time within a part of a run that can be seen from outside."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.processes import Started
from tests.workspace import Workspace

STEP_PARTS = ("sync", "rollout", "reward", "train")
PARTS = ("start-up", "evaluation", *STEP_PARTS, "save", "export")
_POLL_SECONDS = 0.002
_PATIENCE = 300.0


class Moments:
    """The parts of runs like `whole`, and how long each takes."""

    def __init__(self, workspace: Workspace, whole: str, started_after: float) -> None:
        """
        Args:
            started_after: the seconds from the command to the first evaluation, of a run like this.
        """
        self._workspace, self._started_after = workspace, started_after
        metrics = workspace.metrics(whole)
        self._seconds = {
            part: sorted(entry.get(f"seconds/{part}", 0.0) for entry in metrics)[len(metrics) // 2]
            for part in STEP_PARTS
        }

    def wait_for(self, part: str, run: str, started: Started, draw: random.Random) -> bool:
        """Waits for a random time within the part; False: the command has ended before that, or is past it."""
        folder = self._workspace.folder / run
        if part == "start-up":
            return _sleep(draw.uniform(0.0, self._started_after), started)
        if part == "evaluation":
            return _until(lambda: _has(folder / "eval" / "parts"), started) and _sleep(draw.uniform(0.0, 0.3), started)
        if part == "save":
            steps = _lines(folder) + draw.randint(1, 3)
            begun = _until(lambda: _lines(folder) >= steps and _has(folder / "checkpoints", "*.partial-*"), started)
            return begun and _sleep(draw.uniform(0.0, 0.05), started)
        if part == "export":
            return _until(lambda: _has(folder, "hf*"), started) and _sleep(draw.uniform(0.0, 0.5), started)
        steps = _lines(folder) + draw.randint(2, 3)
        if not _until(lambda: _lines(folder) >= steps, started):
            return False
        earlier = sum(self._seconds[other] for other in STEP_PARTS[: STEP_PARTS.index(part)])
        return _sleep(earlier + draw.uniform(0.0, self._seconds[part]), started)


def _has(folder: Path, pattern: str = "*") -> bool:
    return folder.is_dir() and any(folder.glob(pattern))


def _lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _until(happens: Callable[[], bool], started: Started) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while started.process.poll() is None and time.monotonic() < deadline:
        if happens():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _sleep(seconds: float, started: Started) -> bool:
    time.sleep(seconds)
    return started.process.poll() is None


def drawn(parts: Sequence[str], draw: random.Random) -> str:
    """A part, each as likely."""
    return draw.choice(list(parts))
