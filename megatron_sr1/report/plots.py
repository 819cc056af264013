"""Training curves as inline images, one version for a light page and one for a dark page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sr1.report.runs import ReportedRun
from megatron_sr1.report.series import WINDOW, band, running_mean, series

INK = {"light": "#3b4252", "dark": "#c8d0dc"}
COLORS = {
    "light": ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#b08900", "#c2255c", "#495057"),
    "dark": ("#74a9ff", "#ff9d5c", "#69db7c", "#da9bf0", "#5fd0e0", "#ffd95c", "#ff8fb3", "#ced4da"),
}


@dataclass(frozen=True)
class Chart:
    """One chart: the metrics whose names match a pattern (as in the shell)."""

    title: str
    patterns: tuple[str, ...]
    unit: str


CHARTS = (
    Chart("Rewards", ("reward/*",), "mean reward"),
    Chart("Accuracy", ("*accuracy", "language_shortcut_rate", "leak", "faithful"), "share of rollouts"),
    Chart("Distance from the reference model, by stream", ("kl", "kl/*", "*/kl"), "KL, nats per token"),
    Chart("Response length", ("*response_tokens", "*description_tokens", "*response_length"), "tokens"),
    Chart("Trainer against generator", ("*logprob_gap*",), "log-prob gap, nats per token"),
    Chart("Time per step", ("seconds", "seconds/*"), "seconds"),
    Chart("Loss, by stream", ("loss", "loss/*/policy", "loss/*/nll", "heldout/loss"), "loss"),
    Chart("Clipped tokens, by stream", ("loss/*/clip_fraction", "loss/*/dual_clip_fraction"), "share of tokens"),
    Chart("Dead groups, by stream", ("groups/dead", "groups/dead/*", "groups/skipped"), "share of groups"),
    Chart("Cut responses", ("*/truncated",), "share of responses"),
    Chart("Entropy", ("entropy", "entropy/*"), "nats per token"),
    Chart("Visual dependency", ("dependency/*",), "nats per token"),
    Chart("Held-out demonstrations", ("heldout/token_accuracy",), "share of tokens that are likeliest"),
    Chart("Learning rate", ("learning_rate",), "of the language model"),
    Chart("Gradient norm", ("grad_norm",), "L2 norm"),
)


def chart_names(run: ReportedRun, chart: Chart) -> list[str]:
    """The run's metrics that belong to the chart, sorted, each with at least one number."""
    names = {name for entry in run.metrics for name, value in entry.items() if value is not None}
    return sorted(n for n in names - {"step"} if any(fnmatchcase(n, pattern) for pattern in chart.patterns))


def draw_chart(groups: Sequence[Sequence[ReportedRun]], labels: Sequence[str], chart: Chart, theme: str) -> str | None:
    """A transparent PNG as a data address, or None where no run has the metric.

    Thin lines are the values, bold lines their running mean. Each group has its own line style; one of several runs,
    which are seeds of one configuration, is the mean of these in a band of one sample standard deviation each way.
    """
    lines = [
        (i, label, name, group)
        for i, (group, label) in enumerate(zip(groups, labels, strict=True))
        for name in sorted({name for run in group for name in chart_names(run, chart)})
    ]
    if not lines:
        return None
    figure = Figure(figsize=(5.6, 3.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = sorted({name for _, _, name, _ in lines})
    for i, label, name, group in lines:
        color = COLORS[theme][names.index(name) % len(COLORS[theme])]
        style = ("-", "--", ":", "-.")[i % 4]
        text = name if len(groups) == 1 else f"{label}: {name}"
        if len(group) == 1:
            _draw_run(axes, group[0], name, color, style, text)
        else:
            _draw_seeds(axes, group, name, color, style, text)
    dress(axes, chart.unit, theme)
    return png_address(figure)


def _draw_run(axes: Axes, run: ReportedRun, name: str, color: str, style: str, text: str) -> None:
    steps, values = series(run.metrics, name)
    window = max(1, round(WINDOW * len(values)))
    if window > 1:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
    marker = "o" if len(values) == 1 else None
    axes.plot(steps, running_mean(values, window), style, color=color, linewidth=1.8, label=text, marker=marker)


def _draw_seeds(axes: Axes, group: Sequence[ReportedRun], name: str, color: str, style: str, text: str) -> None:
    points = band({number: run.metrics for number, run in enumerate(group)}, name)
    steps, means = list(points), [point.mean for point in points.values()]
    spread = [math.nan if point.std is None else point.std for point in points.values()]  # of one seed a gap
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, means, style, color=color, linewidth=1.8, label=text, marker=marker)
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def png_address(figure: Figure) -> str:
    """The figure as a transparent PNG in a data address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def dress(axes: Axes, unit: str, theme: str) -> None:
    """Labels, grid and legend of a chart over steps."""
    ink = INK[theme]
    axes.set_xlabel("step", color=ink)
    axes.set_ylabel(unit, color=ink)
    axes.tick_params(colors=ink, labelsize=8)
    axes.grid(alpha=0.2, color=ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.legend(frameon=False, fontsize=7.5, labelcolor=ink)
