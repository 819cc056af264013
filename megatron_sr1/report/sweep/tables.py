"""The tables of a sweep as cells of text, for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from megatron_sr1.printable import printable
from megatron_sr1.report.sweep.groups import (
    CONTROLS,
    LAST_STEPS,
    SHARES,
    GroupRow,
    Measure,
    common_start,
    training_measures,
)
from megatron_sr1.report.sweep.statistics import Estimate, PairedDifference
from megatron_sr1.report.text_table import TextTable, print_text_table

UNKNOWN = "–"


def text_tables(rows: Sequence[GroupRow]) -> list[TextTable]:
    """Held-out evaluation, controls of its second pass, last training steps, and paired differences to the first row;
    without empty ones."""
    spread = "mean ± sample standard deviation over the seeds"
    shares, controls = (
        [measure for measure in measures if any(measure.key in row.after for row in rows)]
        for measures in (SHARES, CONTROLS)
    )
    training = training_measures(rows)
    finished = [row for row in rows if row.per_seed]
    last = [(row.label, len(row.per_seed), _estimates(row.after, training)) for row in finished]
    tables = [
        _across("evaluation", f"Held-out evaluation, % of prompts; {spread}", shares, _evaluation_lines(rows, shares)),
        _across("controls", f"Controls of the second pass, %; {spread}", controls, _evaluation_lines(rows, controls)),
        _down("training", f"Training, the last {LAST_STEPS} steps; {spread}", training, last),
    ]
    compared = [(row, max(d.num for d in row.differences.values())) for row in finished if row.differences]
    if compared:
        title, spread = f"Paired differences to {rows[0].label}", "over common seeds, mean ± standard error"
        points = [(row.label, num, _differences(row.differences, shares)) for row, num in compared]
        asked = [(row.label, num, _differences(row.differences, controls)) for row, num in compared]
        others = [(row.label, num, _differences(row.differences, training)) for row, num in compared]
        tables += [
            _across("paired", f"{title}, points; {spread}", shares, points),
            _across("paired-controls", f"{title}, controls, points; {spread}", controls, asked),
            _down("paired-training", f"{title}, the last {LAST_STEPS} steps; {spread}", training, others),
        ]
    return [table for table in tables if table.lines]


_Line = tuple[str, int, list[str]]  # label, number of seeds, a cell for each measure


def _across(key: str, title: str, measures: Sequence[Measure], lines: Sequence[_Line]) -> TextTable:
    """A line for each group."""
    head = ("", "seeds", *(measure.title for measure in measures))
    body = tuple((label, str(num), *cells) for label, num, cells in lines)
    return TextTable(key, title, head, body if measures else ())


def _down(key: str, title: str, measures: Sequence[Measure], lines: Sequence[_Line]) -> TextTable:
    """A column for each group: for measures too many to stand side by side."""
    head = ("", *(label for label, _, _ in lines))
    seeds = ("seeds", *(str(num) for _, num, _ in lines))
    body = [(m.title, *(cells[index] for _, _, cells in lines)) for index, m in enumerate(measures)]
    return TextTable(key, title, head, (seeds, *body) if lines and measures else ())


def _evaluation_lines(rows: Sequence[GroupRow], measures: Sequence[Measure]) -> list[_Line]:
    lines = []
    if common_start(rows):
        one = next(row for row in rows if row.before)
        values = {key: Estimate(found.mean, None, 1) for key, found in one.before.items()}  # the same for every seed
        lines.append(("before", sum(len(row.per_seed) for row in rows), _estimates(values, measures)))
    else:
        lines += [(f"{r.label}, before", len(r.per_seed), _estimates(r.before, measures)) for r in rows if r.before]
    return [*lines, *((row.label, len(row.per_seed), _estimates(row.after, measures)) for row in rows if row.per_seed)]


def _estimates(values: Mapping[str, Estimate], measures: Sequence[Measure]) -> list[str]:
    return [_cell(m, values[m.key].mean, values[m.key].std) if m.key in values else UNKNOWN for m in measures]


def _differences(values: Mapping[str, PairedDifference], measures: Sequence[Measure]) -> list[str]:
    found = [(measure, values.get(measure.key)) for measure in measures]
    return [UNKNOWN if d is None else _cell(m, d.mean, d.error, sign="+") for m, d in found]


def _cell(measure: Measure, mean: float, spread: float | None, sign: str = "") -> str:
    text = f"{measure.scale * mean:{sign}.{measure.digits}f}"
    return text if spread is None else f"{text} ± {measure.scale * spread:.{measure.digits}f}"


def notes(rows: Sequence[GroupRow]) -> list[str]:
    """What a reader must know beside the tables."""
    unfinished = [name for row in rows for name in row.unfinished]
    found = [f"not in the numbers, because unfinished: {', '.join(unfinished)}"] if unfinished else []
    if len({row.preset for row in rows if "reward/total" in row.after}) > 1:
        found.append("reward/total is what a preset's own streams earn: compare it within a preset alone")
    return found


def print_tables(console: Console, rows: Sequence[GroupRow]) -> None:
    """Prints the tables, and what is not in them."""
    for table in text_tables(rows):
        print_text_table(console, table)
    for note in notes(rows):
        console.print(printable(note), markup=False, highlight=False, soft_wrap=True)


def markdown(rows: Sequence[GroupRow]) -> str:
    """The tables as Markdown."""
    blocks = []
    for table in text_tables(rows):
        align = "|---|" + "---:|" * (len(table.head) - 1)
        lines = ["| " + " | ".join(line) + " |" for line in (table.head, *table.lines)]
        blocks.append("\n".join([f"{table.title}:", "", lines[0], align, *lines[1:]]))
    blocks += [f"{note[0].upper()}{note[1:]}." for note in notes(rows)]
    return "\n\n".join(blocks) + "\n"
