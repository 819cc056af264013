"""Typed metrics: each knows how values of several micro-batches and ranks become one, and sinks that keep them.

Names are paths: `reward/total`, `seconds/rollout`. The report draws one chart per group of names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Reduction = Literal["sum", "mean", "max", "min", "last"]
PROGRESS_METRICS = {
    "loss/sft/nll": "loss",
    "reward/total": "reward",
    "accuracy": "accuracy",
    "language_shortcut_rate": "LSR",
    "tokens_per_second": "tokens/s",
}


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


class MetricsSink(Protocol):
    """Takes the reduced metrics of each step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object per step, flushed at once; NaN and infinity, which JSON cannot hold, become null.

    On resume, entries of steps that will run again are dropped, and so is a last line cut short by a kill, so the
    file never holds a step twice.

    Args:
        path: the file, made where missing.
        start_step: the first step that will be written.

    Raises:
        ValueError: a line that is not JSON (other than a torn last one).
    """

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_jsonl(path) if entry["step"] < start_step] if path.exists() else []
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")
        self._last_step = kept[-1]["step"] if kept else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line.

        Raises:
            ValueError: the step is not after the last one written.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} was written after step {self._last_step}: steps must grow.")
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, float | None]]:
    """The entries of a metrics file, without a torn last line.

    Raises:
        ValueError: any other line that is not a JSON object with a `step`; the message gives file and line.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]  # what follows the last newline is empty, or torn
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}. Repair or remove that line.") from error
        if not isinstance(entry, dict) or "step" not in entry:
            raise ValueError(f"{path}:{number} holds no step. Repair or remove that line.")
        entries.append(entry)
    return entries


class TensorBoardSink:
    """TensorBoard event files; entries of steps that run again are hidden by `purge_step`."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import: only where it is used

        self._writer = SummaryWriter(str(folder), purge_step=start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class ProgressSink:
    """A progress bar with the metrics that matter and the time left; a plain line per step where there is no terminal.

    Args:
        total_steps: where the bar ends.
        start_step: the first step that will be written; earlier ones count as done.
        console: where to draw.
        shown: metric name -> label, in order; a metric that a step lacks is left out.
    """

    def __init__(
        self, total_steps: int, start_step: int, console: Console, shown: Mapping[str, str] = PROGRESS_METRICS
    ) -> None:
        self._console, self._total, self._shown = console, total_steps, shown
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = ("step", MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[summary]}"), "left")
            self._progress = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._progress.add_task("", total=total_steps, completed=start_step, summary="")
            self._progress.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar to `step` + 1 steps done, or prints one line."""
        summary = "  ".join(f"{label} {_short(values[name])}" for name, label in self._shown.items() if name in values)
        if self._progress is None:
            self._console.print(
                f"step {step + 1}/{self._total}  {summary}", markup=False, highlight=False, soft_wrap=True
            )
        else:
            self._progress.update(self._task, completed=step + 1, summary=summary)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"


class MetricsWriter:
    """Every sink of a run: `<run_dir>/metrics.jsonl`, `<run_dir>/tensorboard/`, the progress bar. Use on one rank only.

    Args:
        run_dir: the run's folder, made where missing.
        start_step: the first step that will be written, 0 for a new run.
        total_steps: the step at which the run ends.
        console: where progress goes; standard output by default.
    """

    def __init__(self, run_dir: Path, start_step: int, total_steps: int, console: Console | None = None) -> None:
        self._run_dir, self._start, self._total = run_dir, start_step, total_steps
        self._console = console or Console()
        self._sinks: list[MetricsSink] = []

    def __enter__(self) -> MetricsWriter:
        self._sinks = [
            JsonlSink(self._run_dir / "metrics.jsonl", self._start),
            TensorBoardSink(self._run_dir / "tensorboard", self._start),
            ProgressSink(self._total, self._start, self._console),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the reduced metrics of `step` (the first is 0) to every sink."""
        for sink in self._sinks:
            sink.write(step, values)
