"""Mean, spread and paired differences over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Mean over `num` seeds, and the sample standard deviation sqrt(sum (x - mean)^2 / (num - 1)), None of one seed."""

    mean: float
    std: float | None
    num: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of x(seed) - base(seed) over the `num` seeds that both have, and its standard error std / sqrt(num), None of
    one seed. Pairing takes out what a seed does to both: the same data order, the same draws at the first step."""

    mean: float
    error: float | None
    num: int


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), std, len(values))


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> PairedDifference | None:
    """From seed -> value on both sides; None where they have no seed in common."""
    seeds = sorted(values.keys() & base.keys())
    if not seeds:
        return None
    over_seeds = estimate([values[seed] - base[seed] for seed in seeds])
    error = None if over_seeds.std is None else over_seeds.std / math.sqrt(over_seeds.num)
    return PairedDifference(over_seeds.mean, error, over_seeds.num)
