"""Metrics over the steps: of one run, and of the seeds of one configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_sr1.report.sweep.statistics import Estimate, estimate

WINDOW = 0.05  # smoothing: the share of the steps that one point of the bold line averages


def series(metrics: Sequence[Mapping[str, float | None]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric; an entry that is null (not finite when measured) becomes a gap."""
    points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
    return [float(s) for s, _ in points if s is not None], [math.nan if v is None else v for _, v in points]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each point, gaps left out; a point with gaps only stays a gap."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(math.fsum(recent) / len(recent) if recent else math.nan)
    return means


def band(runs: Mapping[int, Sequence[Mapping[str, float | None]]], name: str) -> dict[float, Estimate]:
    """Step -> estimate over the seeds that have the step; each seed's curve is its running mean over WINDOW of its
    steps, gaps left out."""
    by_step: dict[float, list[float]] = {}
    for metrics in runs.values():
        steps, values = series(metrics, name)
        for step, value in zip(steps, running_mean(values, max(1, round(WINDOW * len(values)))), strict=True):
            if not math.isnan(value):
                by_step.setdefault(step, []).append(value)
    return {step: estimate(values) for step, values in sorted(by_step.items())}
