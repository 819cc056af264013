"""Which samples the filters of the viewer find, as far as texts and rewards alone tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

RIGHT_FROM = 0.5  # a reward in [0, 1] says right from here


def filters_of(
    rewards: Mapping[str, float | Sequence[float]], description: str | None, *, described: bool, cut: bool
) -> frozenset[str]:
    """Those that texts and rewards alone tell."""
    right, seen = (rewards.get(name) for name in ("acc", "acc_vis"))
    found = {
        "shortcut": described and right is not None and seen is not None and says_yes(right) and not says_yes(seen),
        "leak": described and "leak" in rewards and says_yes(rewards["leak"]),
        "undescribed": described and description is None,
        "cut": cut,
        "not_finite": any(not is_finite(value) for value in rewards.values()),
    }
    return frozenset(name for name, holds in found.items() if holds)


def says_yes(value: float | Sequence[float]) -> bool:
    """Whether a reward, of several samples their mean, does."""
    values = [value] if isinstance(value, int | float) else list(value)
    return bool(values) and sum(values) / len(values) >= RIGHT_FROM


def is_finite(value: float | Sequence[float]) -> bool:
    """Whether a reward, or all of several, is a number."""
    values = [value] if isinstance(value, int | float) else list(value)
    return all(map(math.isfinite, values))
