"""What can be seen of a run from its folder alone, while it is at work or afterwards: `megatron-sr1 watch`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from megatron_sr1.metrics.pace import duration
from megatron_sr1.metrics.progress import BETWEEN, StepLines, draws, pace_words, print_line
from megatron_sr1.metrics.shown import Entry, shown_metrics
from megatron_sr1.metrics.status import FILE, SILENT_SECONDS, Status, read_status
from megatron_sr1.printable import one_printable_line, printable

METRICS = "metrics.jsonl"
LOOK_SECONDS = 1.0  # between two looks at the folder
_TAIL_BYTES = 1 << 18  # of metrics.jsonl: many steps' lines
_EVALUATED = ("accuracy", "second_pass_accuracy", "language_shortcut_rate")


@dataclass(frozen=True)
class View:
    """A run at one moment."""

    folder: Path
    exists: bool
    status: Status | None
    entries: tuple[Entry, ...]  # the last ones of metrics.jsonl
    evaluation: str  # the last one, in words; "": there is none
    faults: tuple[str, ...]  # files that cannot be read
    now: float = field(default_factory=time.time)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen here: the run is at its end."""
        return self.status is not None and self.status.state == "finished"

    @property
    def done(self) -> int:
        """Steps. A run that goes on from an earlier one has fewer than metrics.jsonl still holds."""
        measured = int(self.entries[-1]["step"] or 0) + 1 if self.entries else 0
        known = None if self.status is None else self.status.done
        return measured if known is None else known

    @property
    def last(self) -> Entry:
        """What the last of them has measured."""
        return next((entry for entry in reversed(self.entries) if (entry["step"] or 0) < self.done), {})

    @property
    def headline(self) -> str:
        """Folder, command, and what has become of it."""
        name = printable(str(self.folder))
        if not self.exists:
            return f"{name}: not started, there is no such folder yet"
        if self.status is None:
            found = f"no {FILE}" + (": of an earlier release, or damaged" if self.entries else "")
            return f"{name}: {'' if self.entries else 'not started, '}{found}"
        return printable(f"{name}: {self.status.command}, {self._state(self.status)}")

    def _state(self, status: Status) -> str:
        ago = duration(self.now - status.updated)
        if status.state == "failed":
            return f"failed {ago} ago: {printable(status.reason)}"
        if status.is_over:
            more = "; the same command goes on from what is saved" if status.state == "stopped" else ""
            return f"{status.state} {ago} ago, after {duration(status.updated - status.began)}{more}"
        where = f"process {status.process_id} on {printable(status.host)}"
        at = self.at
        if status.process == "gone":
            return f"killed: {where} is gone, {at or 'between phases'} when last heard of {ago} ago"
        if self.now - status.updated > SILENT_SECONDS:
            return f"silent for {ago}: {where}, then at {at or 'nothing that has a name'}"
        return f"running for {duration(self.now - status.began)}" + (f", {at}" if at else "")

    @property
    def at(self) -> str:
        """What it is at: "evaluation 0:12 (40 of 100 prompts)"."""
        status = self.status
        if status is None or not status.phases:
            return ""
        name, *within = status.phases
        inner = f": {within[-1]}" if within else ""
        detail = f" ({status.detail})" if status.detail else ""
        return printable(f"{name} {duration(self.now - status.since)}{inner}{detail}")

    @property
    def stages(self) -> str:
        """Of the start, with their times."""
        found = () if self.status is None else self.status.stages
        return ", ".join(printable(f"{name} {seconds:.1f} s") for name, seconds in found[-_MOST_STAGES:])

    @property
    def times(self) -> list[str]:
        """A step's, and what is left."""
        status = self.status
        if status is None:
            return []
        runs = not status.is_over and status.process != "gone"
        left = max(0.0, status.ends - self.now) if runs and status.ends is not None else None
        return pace_words(status.step_seconds, left)


_MOST_STAGES = 8


def look(folder: Path) -> View:
    """Raises ValueError where the path is a file."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Name the folder of a run, its run_dir.")
    faults: list[str] = []

    def tried(read: Callable[[], object]) -> object:
        try:
            return read()
        except (OSError, ValueError) as error:
            faults.append(one_printable_line(str(error)))
            return None

    status, entries = tried(lambda: read_status(folder)), tried(lambda: last_entries(folder / METRICS))
    evaluation = tried(lambda: _last_evaluation(folder / "eval"))
    return View(
        folder,
        folder.is_dir(),
        status if isinstance(status, Status) else None,
        entries if isinstance(entries, tuple) else (),
        str(evaluation or ""),
        tuple(faults),
    )


def last_entries(path: Path) -> tuple[Entry, ...]:
    """The last lines of a metrics file, without one that is being written or torn; () where there is none.

    Raises:
        ValueError: one of them is no step.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = file.seek(max(0, size - _TAIL_BYTES))
            data = file.read()
    except FileNotFoundError:
        return ()
    lines = data.split(b"\n")[1 if start else 0 : -1]  # the first may have begun before
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} has a line that is not JSON: {error}. Repair or remove it.") from error
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise ValueError(f"{path} has a line without a step. Repair or remove it.")
        entries.append({name: value for name, value in entry.items() if value is None or _is_number(value)})
    return tuple(entries)


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _last_evaluation(folder: Path) -> str:
    """Of the weights of the highest step."""
    found = []
    for path in sorted(folder.glob("*.json")):
        tree = json.loads(path.read_bytes())
        if isinstance(tree, dict) and isinstance(tree.get("summary"), dict) and isinstance(tree.get("step"), int):
            found.append((tree["step"], tree["summary"]))
    if not found:
        return ""
    step, summary = max(found, key=lambda pair: pair[0])
    numbers = [f"{name} {100 * summary[name]:.1f}%" for name in _EVALUATED if type(summary.get(name)) in (int, float)]
    return f"evaluated after step {step}: {', '.join(numbers)}" if numbers else ""


def drawn(view: View, width: int) -> RenderableType:
    """The whole view, no line longer than the terminal is wide."""
    parts: list[RenderableType] = [Text(view.headline)]
    if view.stages:
        parts.append(Text(f"phases: {view.stages}", style="dim"))
    if view.entries or (view.status is not None and view.status.steps):
        parts.append(StepLines(view.done, _steps(view), view.times, shown_metrics(view.last)))
    parts += [Text(line) for line in (view.evaluation, *view.faults) if line]
    return Group(*parts)


def written(view: View) -> list[str]:
    """The same in lines, for what is no terminal."""
    lines = [view.headline]
    if view.stages:
        lines.append(f"phases: {view.stages}")
    if view.entries or (view.status is not None and view.status.steps):
        lines.append(BETWEEN.join([step_words(view), *view.times, *shown_metrics(view.last)]))
    return [*lines, *(line for line in (view.evaluation, *view.faults) if line)]


def step_words(view: View) -> str:
    """Such as "step 5/10"."""
    return _words(view, view.done)


def _words(view: View, done: int) -> str:
    steps = _steps(view)
    return f"step {done}/{steps}" if steps else f"step {done}"


def _steps(view: View) -> int:
    return 0 if view.status is None else view.status.steps


def watch(folder: Path, console: Console, *, once: bool = False, pause: Callable[[float], None] = time.sleep) -> None:
    """Shows the run until it has finished, or once. Ends with KeyboardInterrupt where that is sent.

    Raises:
        ValueError: the path is a file.
    """
    if once or not draws(console):
        _print_views(folder, console, once, pause)
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:
        for view in _views(folder, pause):
            live.update(drawn(view, console.width), refresh=True)


def _print_views(folder: Path, console: Console, once: bool, pause: Callable[[float], None]) -> None:
    """All of the first, and of each that follows what is new."""
    before: View | None = None
    told = 0  # steps
    for view in _views(folder, pause):
        for line in written(view) if before is None else _news(before, view, told):
            print_line(console, line)
        if once:
            return
        before, told = view, told if view.faults else _measured(view)


def _measured(view: View) -> int:
    """Steps that are done and whose metrics are there: either file may be a while behind the other."""
    return min(view.done, int(view.entries[-1]["step"] or 0) + 1) if view.entries else 0


def _news(before: View, view: View, told: int) -> list[str]:
    """A line for each step after those that are told, what else has become known, and what has become of the run."""
    found, last = [], _measured(view)
    for entry in view.entries:
        done = int(entry["step"] or 0) + 1
        if told < done <= last:
            times = view.times if done == last else []
            found.append(BETWEEN.join([_words(view, done), *times, *shown_metrics(entry)]))
    known = (before.evaluation, *before.faults)
    found += [line for line in (view.evaluation, *view.faults) if line and line not in known]
    return found + ([view.headline] if _kind(before) != _kind(view) else [])


def _kind(view: View) -> tuple[object, ...]:
    """What a headline says, but for its times."""
    status = view.status
    if status is None:
        return (view.exists,)
    phase = status.phases[:1] if not view.entries or not status.done else ()  # during the steps these are told
    silent = view.now - status.updated > SILENT_SECONDS
    return status.state, status.process, silent, phase, status.process_id, view.faults


def _views(folder: Path, pause: Callable[[float], None]) -> Iterator[View]:
    while True:
        view = look(folder)
        yield view
        if view.is_over:
            return
        pause(LOOK_SECONDS)
