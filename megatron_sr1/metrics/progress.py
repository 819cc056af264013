"""What whoever watches a run sees of its steps: on a terminal lines that are drawn anew, elsewhere one line a step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_sr1.metrics.pace import Course, Pace, duration
from megatron_sr1.metrics.shown import shown_metrics
from megatron_sr1.phases import Phases, during

LIVE_FROM = 30  # columns; on fewer, lines are printed as they are
BAR_FROM = 70  # columns; on fewer, the numbers need them all
REDRAWN_A_SECOND = 2
BETWEEN = "  "


class ProgressSink:
    """A bar with the metrics that matter, the time left and what the run is at; a plain line per step where there is no
    terminal, or one that can draw nothing anew (TERM=dumb).

    Args:
        start_step: the first step that will be written; earlier ones count as done.
        console: where to draw.
        pace: tells the time; it has had each step when this has it.
        phases: of this process.
    """

    def __init__(self, start_step: int, console: Console, pace: Pace, phases: Phases = during) -> None:
        self._console, self._pace, self._phases = console, pace, phases
        self._done, self._metrics = start_step, list[str]()
        self._live: Live | None = None
        if draws(console):
            self._live = Live(get_renderable=self._drawn, console=console, refresh_per_second=REDRAWN_A_SECOND)
            self._live.start(refresh=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Draws `step` + 1 steps done, or prints one line."""
        self._done, self._metrics = step + 1, shown_metrics(values)
        if self._live is None:
            pace = self._pace
            facts = [f"step {self._done}/{pace.course.steps}", *pace_words(pace.step_seconds, pace.seconds_left)]
            print_line(self._console, BETWEEN.join([*facts, *self._metrics]))
        else:
            self._live.refresh()

    def close(self) -> None:
        """Leaves the steps as they stand."""
        if self._live is not None:
            self._live.stop()

    def _drawn(self) -> StepLines:
        pace = self._pace
        times = [*pace_words(pace.step_seconds, pace.seconds_left), *phase_words(self._phases, time.monotonic())]
        return StepLines(self._done, pace.course.steps, times, self._metrics)


def phase_words(phases: Phases, now: float) -> list[str]:
    """What is being done, for how long, and how far it is: ["evaluation 0:12 (40 of 100 prompts)"]."""
    opened = phases.open
    if not opened:
        return []
    return [f"{opened[0].name} {duration(now - opened[0].since)}" + (f" ({phases.detail})" if phases.detail else "")]


def plain_pace(steps: int) -> Pace:
    """Of a run that neither saves nor evaluates."""
    return Pace(Course(steps))


def draws(console: Console) -> bool:
    """Whether lines can be drawn anew there."""
    return console.is_terminal and not console.is_dumb_terminal and console.width >= LIVE_FROM


def print_line(console: Console, text: str) -> None:
    """One line, however narrow the console is: rich would break it, and take brackets for markup."""
    print(text, file=console.file, flush=True)


def pace_words(step_seconds: float | None, seconds_left: float | None) -> list[str]:
    """Such as ["12.3 s/step", "1:02:03 left"]."""
    step = (
        []
        if step_seconds is None
        else [f"{step_seconds:.3g} s/step" if step_seconds < 100 else f"{step_seconds:.0f} s/step"]
    )
    return step + ([] if seconds_left is None else [f"{duration(seconds_left)} left"])


class StepLines:
    """Steps with a bar and the time, and behind them the metrics, broken where the lines end."""

    def __init__(self, done: int, steps: int, times: Sequence[str], metrics: Sequence[str]) -> None:
        self._done, self._steps, self._times, self._metrics = done, steps, times, metrics

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        done, parts = f"step {self._done}/{self._steps}", list(self._metrics)
        if options.max_width >= BAR_FROM:
            head = Table.grid(padding=(0, 1), expand=True)
            words = [Text(done), ProgressBar(max(1, self._steps), self._done), Text(BETWEEN.join(self._times))]
            for word in words:
                head.add_column(no_wrap=True, ratio=1 if isinstance(word, ProgressBar) else None)
            head.add_row(*words)
            yield head
        else:
            parts = [done, *self._times, *parts]
        for line in lines_of(parts, options.max_width):
            yield Text(line)


def lines_of(parts: Sequence[str], width: int) -> list[str]:
    """As many parts on each line as it holds."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(BETWEEN) + len(part) <= width:
            lines[-1] += BETWEEN + part
        else:
            lines.append(part)
    return lines
