"""`starts.jsonl` in a run's folder: a line for each start, of the step that it began with, the configuration, and the
machine. A start redoes the steps behind its checkpoint, so a step is of the last start that began with it or before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STARTS_FILE = "starts.jsonl"


def config_digest(text: str) -> str:
    """Of the text of a config.yaml."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def note_start(run: Path, config_text: str, step: int | None, machine: Mapping[str, Any]) -> None:
    """Adds a line. One that a kill has left unfinished is removed first.

    Args:
        step: the first that this start makes; None: it trains nothing.
    """
    line = json.dumps({"step": step, "config": config_digest(config_text), **machine})
    path = run / STARTS_FILE
    torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    if torn:
        whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The lines of `starts.jsonl`, in order; [] where there is no such file.

    Raises:
        ValueError: it is damaged; a last line that was not finished is left out.
    """
    path = run / STARTS_FILE
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], start=1):
        try:
            start = json.loads(line)
            start["step"], start["config"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is no start of a run ({error!r}). Repair or remove it.") from error
        found.append(start)
    return found
