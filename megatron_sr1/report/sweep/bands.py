"""Training curves of a sweep: a group's mean over its seeds, in a band of one sample standard deviation each way."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sr1.report.plots import COLORS, dress, png_address
from megatron_sr1.report.series import band
from megatron_sr1.report.sweep.groups import GroupRow

FIRST = (  # in this order; what else a run has of rewards follows
    *("reward/total", "accuracy", "second_pass_accuracy", "language_shortcut_rate", "faithful", "leak"),
    *("first/response_tokens", "second/response_tokens", "loss/sft/nll"),
)


def band_names(rows: Sequence[GroupRow]) -> list[str]:
    """The metrics to draw: those of FIRST that any run has, then the components of the reward."""
    known = {name for row in rows for run in row.runs.values() for entry in run.metrics for name in entry}
    return [name for name in FIRST if name in known] + sorted(
        name for name in known if name.startswith("reward/") and name not in FIRST
    )


def draw_bands(rows: Sequence[GroupRow], name: str, theme: str) -> str:
    """A transparent PNG as a data address."""
    figure = Figure(figsize=(5.6, 3.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        points = band({seed: run.metrics for seed, run in row.runs.items()}, name)
        if not points:
            continue
        color, steps = COLORS[theme][number % len(COLORS[theme])], list(points)
        means = [point.mean for point in points.values()]
        spread = [math.nan if point.std is None else point.std for point in points.values()]  # of one seed a gap
        axes.plot(steps, means, color=color, linewidth=1.8, label=f"{row.label} ({len(row.runs)})")
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    dress(axes, name, theme)
    return png_address(figure)
