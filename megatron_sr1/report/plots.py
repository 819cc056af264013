"""Training curves as inline images, one version for a light page and one for a dark page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sr1.report.runs import ReportedRun

INK = {"light": "#3b4252", "dark": "#c8d0dc"}
COLORS = {
    "light": ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#b08900", "#c2255c", "#495057"),
    "dark": ("#74a9ff", "#ff9d5c", "#69db7c", "#da9bf0", "#5fd0e0", "#ffd95c", "#ff8fb3", "#ced4da"),
}
WINDOW = 0.05  # smoothing: the share of the steps that one point of the bold line averages


@dataclass(frozen=True)
class Chart:
    """One chart: the metrics whose names match a pattern (as in the shell)."""

    title: str
    patterns: tuple[str, ...]
    unit: str


CHARTS = (
    Chart("Rewards", ("reward/*",), "mean reward"),
    Chart("Accuracy", ("*accuracy", "language_shortcut_rate", "leak", "faithful"), "share of rollouts"),
    Chart("Distance from the reference model", ("kl", "kl/*", "*/kl"), "KL, nats per token"),
    Chart("Response length", ("*response_tokens", "*description_tokens", "*response_length"), "tokens"),
    Chart("Trainer against generator", ("*logprob_gap*",), "log-prob gap, nats per token"),
    Chart("Time per step", ("seconds", "seconds/*"), "seconds"),
    Chart("Loss", ("loss", "loss/*/policy", "loss/*/nll", "heldout/loss"), "loss"),
    Chart("Held-out demonstrations", ("heldout/token_accuracy",), "share of tokens that are likeliest"),
    Chart("Learning rate", ("learning_rate",), "of the language model"),
    Chart("Gradient norm", ("grad_norm",), "L2 norm"),
)


def chart_names(run: ReportedRun, chart: Chart) -> list[str]:
    """The run's metrics that belong to the chart, sorted, each with at least one number."""
    names = {name for entry in run.metrics for name, value in entry.items() if value is not None}
    return sorted(n for n in names - {"step"} if any(fnmatchcase(n, pattern) for pattern in chart.patterns))


def draw_chart(runs: Sequence[ReportedRun], labels: Sequence[str], chart: Chart, theme: str) -> str | None:
    """A transparent PNG as a data address, or None where no run has the metric.

    Thin lines are the values, bold lines their running mean. With several runs each has its own line style.
    """
    lines = [
        (i, label, name, run)
        for i, (run, label) in enumerate(zip(runs, labels, strict=True))
        for name in chart_names(run, chart)
    ]
    if not lines:
        return None
    figure = Figure(figsize=(5.6, 3.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = sorted({name for _, _, name, _ in lines})
    for i, label, name, run in lines:
        steps, values = series(run.metrics, name)
        color = COLORS[theme][names.index(name) % len(COLORS[theme])]
        style = ("-", "--", ":", "-.")[i % 4]
        window = max(1, round(WINDOW * len(values)))
        if window > 1:
            axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
        text = name if len(runs) == 1 else f"{label}: {name}"
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, running_mean(values, window), style, color=color, linewidth=1.8, label=text, marker=marker)
    dress(axes, chart.unit, theme)
    return png_address(figure)


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
