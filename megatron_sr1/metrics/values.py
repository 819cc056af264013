"""Typed metrics: each knows how values of several micro-batches and ranks become one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Reduction = Literal["sum", "mean", "max", "min", "last"]


@dataclass(frozen=True)
class Metric:
    """One measured value.

    Raises:
        ValueError: unknown reduction, or a weight that is not positive.
    """

    name: str
    value: float
    reduction: Reduction = "mean"
    weight: float = 1.0  # of a mean: how many things `value` is the average of

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise ValueError(
                f"metric {self.name!r}: reduction={self.reduction!r} is not allowed: "
                f"it must be one of {', '.join(get_args(Reduction))}."
            )
        if not self.weight > 0:
            raise ValueError(
                f"metric {self.name!r}: weight={self.weight} must be greater than 0; leave the metric out."
            )


class MetricLog:
    """Collects the metrics of one step on one rank."""

    def __init__(self) -> None:
        self._metrics: list[Metric] = []

    def add(self, name: str, value: float, reduction: Reduction = "mean", weight: float = 1.0) -> None:
        """Notes one value; the same name may be added many times."""
        self._metrics.append(Metric(name, float(value), reduction, weight))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What was added, in order: gather these over the ranks and give all of them to `reduce_over`."""
        return tuple(self._metrics)

    def reduce(self) -> dict[str, float]:
        """The values of this log alone."""
        return reduce_over(self._metrics)


def reduce_over(metrics: Iterable[Metric]) -> dict[str, float]:
    """One value per name, in order of first appearance; mean is sum(weight * value) / sum(weight).

    Raises:
        ValueError: one name with two reductions.
    """
    by_name: dict[str, list[Metric]] = {}
    for metric in metrics:
        by_name.setdefault(metric.name, []).append(metric)
    return {name: _reduce(name, same) for name, same in by_name.items()}


def _reduce(name: str, metrics: list[Metric]) -> float:
    reductions = sorted({metric.reduction for metric in metrics})
    if len(reductions) > 1:
        raise ValueError(f"metric {name!r} was added with several reductions: {', '.join(reductions)}. Use one.")
    values = [metric.value for metric in metrics]
    match metrics[0].reduction:
        case "sum":
            return math.fsum(values)
        case "max":
            return max(values)
        case "min":
            return min(values)
        case "last":
            return values[-1]
        case "mean":
            return math.fsum(m.value * m.weight for m in metrics) / math.fsum(m.weight for m in metrics)
