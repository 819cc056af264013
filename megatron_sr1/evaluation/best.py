"""Which of a run's evaluated steps is the best by one of their numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

Mode = Literal["max", "min"]


def best_step(found: Mapping[int, float], mode: Mode, steps: Iterable[int]) -> int | None:
    """The first of `steps` that has the best number of those found; None where none of them has one."""
    known = [(found[step] if mode == "min" else -found[step], step) for step in steps if step in found]
    return min(known)[1] if known else None


def measured(run_folder: Path, metric: str) -> dict[int, float]:
    """The number by step, of the evaluations of a training run that have it."""
    found: dict[int, float] = {}
    for path in (run_folder / "eval").glob("*.json"):
        if path.stem in ("before", "after") or path.stem.startswith("step-"):
            evaluation = json.loads(path.read_text(encoding="utf-8"))
            value = evaluation["summary"].get(metric)
            if value is not None and math.isfinite(value):
                found[evaluation["step"]] = value
    return found
