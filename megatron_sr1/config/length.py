"""How many steps a run has, where train.epochs says how long it is."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

from megatron_sr1.config.whole import Config

LENGTH_FILE = "length.json"  # of a run folder: what train.epochs came to when the run was started last


def epoch_steps(epochs: float, num_samples: int, step_samples: int) -> int:
    """Steps of `step_samples` in which `num_samples` come `epochs` times, the last one whole: ceil(E * N / B).

    Of E as it is written, for 0.1 in binary is a little more than a tenth.
    """
    return math.ceil(Fraction(repr(epochs)) * num_samples / step_samples)


def known_steps(folder: Path, config: Config) -> int | None:
    """Steps of the whole run in a folder: of its configuration, or as it has noted them; None: it has not begun.

    Raises:
        ValueError: the note is damaged.
    """
    if config.train.steps is not None:
        return config.train.steps
    path = folder / LENGTH_FILE
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Start the run again, which writes it anew.") from error
