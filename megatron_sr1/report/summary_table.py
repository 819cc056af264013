"""The summary table: rows before / after for one run, one row per run where several are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sr1.printable import printable
from megatron_sr1.report.runs import ReportedRun, read_run


@dataclass(frozen=True)
class SummaryColumn:
    """One column of the summary: a share of the prompts."""

    key: str
    title: str
    higher_is_better: bool
    meaning: str


COLUMNS = (
    SummaryColumn("accuracy", "accuracy", True, "the first pass, which sees the image, answers correctly"),
    SummaryColumn("second_pass_accuracy", "second pass", True, "the description alone leads to the correct answer"),
    SummaryColumn(
        "language_shortcut_rate", "LSR", False, "answered correctly although the description does not suffice"
    ),
    SummaryColumn(
        "faithful", "faithful", True, "the description states what the image shows (where the truth is known)"
    ),
    SummaryColumn("format", "format", True, "the first response follows the layout"),
    SummaryColumn("leak", "leak", False, "the description states the answer"),
)


@dataclass(frozen=True)
class SummaryRow:
    """One evaluation in the table. `values` are shares in [0, 1], None where not measured."""

    label: str
    step: int
    values: Mapping[str, float | None]
    by_source: Mapping[str, Mapping[str, float | None]]

    @property
    def num_prompts(self) -> int:
        return int(self.values["num_prompts"] or 0)


def summary_rows(run_dir: Path) -> list[SummaryRow]:
    """One row per evaluation of the run, in order of step: before, (step-n ...,) after."""
    return run_rows(read_run(run_dir))


def run_rows(run: ReportedRun) -> list[SummaryRow]:
    """As `summary_rows`, for a run already read."""
    unknown = dict.fromkeys((*(column.key for column in COLUMNS), "num_prompts"))  # to evaluations of other releases
    return [SummaryRow(e.label, e.step, {**unknown, **e.summary}, e.by_source) for e in run.evaluations]


def comparison_rows(runs: Sequence[ReportedRun]) -> list[SummaryRow]:
    """The rows of one run; of several: the common starting point where they share it, then each run's last evaluation.

    Runs are named by preset, or by folder where two have the same preset.
    """
    evaluated = [run for run in runs if run.evaluations]
    if len(evaluated) == 1:
        return run_rows(evaluated[0])
    names = _names(evaluated)
    rows: list[SummaryRow] = []
    first_rows = [run_rows(run)[0] for run in evaluated]
    same_start = all(row.values == first_rows[0].values for row in first_rows) if first_rows else False
    if same_start and first_rows[0].label == "before":
        rows.append(first_rows[0])
    else:
        starts = zip(names, first_rows, evaluated, strict=True)
        rows += [_renamed(f"{name}, {r.label}", r) for name, r, run in starts if len(run.evaluations) > 1]
    rows += [_renamed(name, run_rows(run)[-1]) for name, run in zip(names, evaluated, strict=True)]
    return rows


def _names(runs: Sequence[ReportedRun]) -> list[str]:
    counts = Counter(run.preset for run in runs)
    return [run.preset if run.preset and counts[run.preset] == 1 else run.name for run in runs]


def _renamed(label: str, row: SummaryRow) -> SummaryRow:
    return SummaryRow(label, row.step, row.values, row.by_source)


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal; a dash where it was not measured."""
    return "–" if value is None else f"{100 * value:.1f}"


def print_table(console: Console, rows: Sequence[SummaryRow]) -> None:
    """Prints the summary, in percent of the prompts."""
    table = Table(title="Held-out evaluation, % of prompts", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True, min_width=max((len(row.label) for row in rows), default=0))
    for column in COLUMNS:
        arrow = "↑" if column.higher_is_better else "↓"
        longest_word = max(len(word) for word in column.title.split())
        table.add_column(f"{column.title}\n{arrow}", justify="right", min_width=longest_word)
    table.add_column("prompts", justify="right")
    for row in rows:
        cells = [percent(row.values[column.key]) for column in COLUMNS]
        table.add_row(Text(printable(row.label)), *cells, str(row.num_prompts))
    console.print(table)
