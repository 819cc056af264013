"""What whoever watches a run sees of it: a progress bar, or lines."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

BAR_FROM = 90  # columns; narrower, the numbers need them all
PROGRESS_METRICS = {
    "loss/sft/nll": "loss",
    "reward/total": "reward",
    "accuracy": "accuracy",
    "language_shortcut_rate": "LSR",
    "tokens_per_second": "tokens/s",
}


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
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # takes what the numbers leave of a line
            numbers = TextColumn("{task.fields[summary]}", table_column=Column(no_wrap=True))
            columns = ("step", MofNCompleteColumn(), bar, numbers, TimeRemainingColumn(compact=True), "left")
            columns = tuple(column for column in columns if column is not bar or console.width >= BAR_FROM)
            self._progress = Progress(*columns, console=console, expand=True)
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
