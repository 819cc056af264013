"""Which samples the filters of the viewer find, as far as texts and rewards alone tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

RIGHT_FROM = 0.5  # a reward in [0, 1] says right from here


def filters_of(
    rewards: Mapping[str, float | Sequence[float]], description: str | None, *, described: bool, cut: bool
) -> frozenset[str]:
    """Those that texts and rewards alone tell."""
    says = {name: says_yes(rewards[name]) for name in ("acc", "acc_vis", "leak") if name in rewards}
    found = {
        "shortcut": described and says.get("acc") is True and says.get("acc_vis") is False,
        "leak": described and says.get("leak") is True,
        "undescribed": described and description is None,
        "cut": cut,
        "not_finite": any(not is_finite(value) for value in rewards.values()),
    }
    return frozenset(name for name, holds in found.items() if holds)


def says_yes(value: float | Sequence[float]) -> bool | None:
    """Whether a reward, of several samples their mean, does; None: it is no finite number, or of no sample."""
    mean = mean_of(value)
    return mean >= RIGHT_FROM if math.isfinite(mean) else None


def is_finite(value: float | Sequence[float]) -> bool:
    """Whether a reward, or all of several, is a number."""
    values = [value] if isinstance(value, int | float) else list(value)
    return all(math.isfinite(as_float(one)) for one in values)


def mean_of(value: float | Sequence[float]) -> float:
    """Of one number, or of all of several, whatever they are; NaN of none."""
    values = [value] if isinstance(value, int | float) else list(value)
    return sum(map(as_float, values)) / len(values) if values else math.nan


def as_float(value: float) -> float:
    """Infinity where an integer is beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
