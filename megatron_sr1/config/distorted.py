"""`objective.distorted`: what is written of the siblings that are drawn from noisy images, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sr1.config.rules import COUNT_OR_NONE, Range, known_key, require, require_number
from megatron_sr1.config.schedules import check_schedule

KEYS = ("samples", "strength")
EXAMPLE = "Write {samples: 4, strength: 0.5}, or strength: {from: 0.5, to: 0.0, steps: 200, shape: sigmoid}."
_STRENGTH = Range(0.001, 1)  # less is no step of noise
_END = Range(0, 1)


def check_distorted(distorted: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: an unknown key, or a value that is not allowed.
    """
    where = "objective.distorted"
    for key, value in distorted.items():
        place = f"{where}.{key}"
        known_key(place, key, KEYS, "section on distorted siblings")
        if key == "samples":
            require_number(
                place, value, COUNT_OR_NONE, whole=True, remedy="0 takes a preset's distorted siblings away."
            )
        elif isinstance(value, Mapping):
            check_schedule(place, value, _END, EXAMPLE)
            ends = (value["from"], value["to"])
            require(
                max(ends) >= _STRENGTH.low, place, dict(value), f"one that is {_STRENGTH.low} or more once", EXAMPLE
            )
        else:
            require_number(place, value, _STRENGTH, remedy=EXAMPLE)
