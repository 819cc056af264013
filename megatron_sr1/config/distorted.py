"""`objective.distorted`: what is written of the siblings that are drawn from noisy images, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sr1.config.rules import COUNT, Range, known_key, require_number
from megatron_sr1.config.schedules import check_schedule

KEYS = ("samples", "strength")
EXAMPLE = "Write {samples: 4, strength: 0.5}, or strength: {from: 0.5, to: 0.0, steps: 200, shape: sigmoid}."
_STRENGTH = Range(0, 1, above=True)
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
            require_number(place, value, COUNT, whole=True, remedy="Leave objective.distorted out for none.")
        elif isinstance(value, Mapping):
            check_schedule(place, value, _END, EXAMPLE)
        else:
            require_number(place, value, _STRENGTH, remedy=EXAMPLE)
