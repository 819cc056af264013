"""Coefficients of a stream that change over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sr1.config.streams import SCHEDULED
from megatron_sr1.types import Schedule


def with_largest(entry: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Schedule, ...]]:
    """An entry of `objective.streams` whose coefficients are numbers: of those that have a schedule the end that is
    larger in size, so that what a run needs at some step is there; and the schedules.

    Args:
        entry: checked by `config.streams`.
    """
    plain, schedules = dict(entry), []
    for key in SCHEDULED:
        value = entry.get(key)
        if isinstance(value, Mapping):
            ends = (float(value["from"]), float(value["to"]))
            schedules.append(Schedule(key, *ends, value["steps"], value.get("shape", "linear")))
            plain[key] = max(ends, key=abs)
    return plain, tuple(schedules)
