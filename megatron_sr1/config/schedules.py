"""What is written of a number that changes over the steps of a run, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from megatron_sr1.config.rules import COUNT, Range, known_key, require, require_number
from megatron_sr1.types import ScheduleShape

_OF_SIGMOID = {"slope": Range(0, 500, above=True), "middle": Range(0, 1)}
KEYS = ("from", "to", "steps", "shape", *_OF_SIGMOID)


def check_schedule(where: str, value: Mapping[Any, Any], allowed: Range, example: str) -> None:
    """
    Args:
        allowed: what both ends may be.
        example: of a schedule, for messages.

    Raises:
        ConfigError: an unknown key, one that is missing, a value that is not allowed, or a key of another shape.
    """
    shape = value.get("shape", "linear")
    for key, given in value.items():
        place = f"{where}.{key}"
        known_key(place, str(key), KEYS, "schedule")
        if key == "shape":
            shapes = get_args(ScheduleShape)
            require(given in shapes, place, given, "one of " + ", ".join(shapes), example)
        elif key in _OF_SIGMOID:
            require(shape == "sigmoid", place, given, f"left out where shape is {shape}: it is of a sigmoid", example)
            require_number(place, given, _OF_SIGMOID[key])
        else:
            require_number(place, given, COUNT if key == "steps" else allowed, whole=key == "steps")
    missing = [key for key in ("from", "to", "steps") if key not in value]
    require(not missing, f"{where}.{''.join(missing[:1])}", None, "given", example)
