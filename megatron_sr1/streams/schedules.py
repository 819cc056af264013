"""Numbers that change over the steps of a run, such as coefficients of a stream."""

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
            found = schedule_of(key, value)
            schedules.append(found)
            plain[key] = max((found.start, found.end), key=abs)
    return plain, tuple(schedules)


def schedule_of(key: str, written: Mapping[str, Any]) -> Schedule:
    """Of the number that is called `key`.

    Args:
        written: checked by `config.schedules`.
    """
    more = {name: written[name] for name in ("shape", "slope", "middle") if name in written}
    return Schedule(key, float(written["from"]), float(written["to"]), written["steps"], **more)
