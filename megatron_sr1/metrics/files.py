"""The metrics files of a run: metrics.jsonl and TensorBoard's events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path


class JsonlSink:
    """One JSON object per step, flushed at once; NaN and infinity, which JSON cannot hold, become null.

    On resume, entries of steps that will run again are dropped, and so is a last line cut short by a kill, so the
    file never holds a step twice.

    Args:
        path: the file, made where missing.
        start_step: the first step that will be written.

    Raises:
        ValueError: a line that is not JSON (other than a torn last one).
    """

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_jsonl(path) if _step_of(entry) < start_step] if path.exists() else []
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._last_step = _step_of(kept[-1]) if kept else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line.

        Raises:
            ValueError: the step is not after the last one written.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} was written after step {self._last_step}: steps must grow.")
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, float | None]]:
    """The entries of a metrics file, without a torn last line.

    Raises:
        ValueError: any other line that is not a JSON object with a `step`; the message gives file and line.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]  # what follows the last newline is empty, or torn
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}. Repair or remove that line.") from error
        if not isinstance(entry, dict) or "step" not in entry:
            raise ValueError(f"{path}:{number} holds no step. Repair or remove that line.")
        entries.append(entry)
    return entries


def _step_of(entry: dict[str, float | None]) -> float:
    step = entry["step"]
    assert step is not None, "every line has a step"
    return step


class TensorBoardSink:
    """TensorBoard event files; entries of steps that run again are hidden by `purge_step`."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import: only where it is used

        self._writer = SummaryWriter(str(folder), purge_step=start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()
