"""The table of controls in the terminal: a row per source and one for all, in percent."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sr1.config.evaluation import CONTROLS
from megatron_sr1.evaluation.control_tally import gap_of
from megatron_sr1.evaluation.percent import percent, with_interval
from megatron_sr1.evaluation.summary import Numbers
from megatron_sr1.printable import printable

_TITLES = {"prior": "sufficiency", "reference": "second reader", "other_question": "other question"}


def print_controls(console: Console, summary: Numbers, by_source: Mapping[str, Numbers]) -> None:
    """Prints the second pass beside the controls that were asked, if any were."""
    asked = [name for name in CONTROLS if f"{name}_accuracy" in summary]
    if not asked:
        return
    table = Table(title="Controls of the second pass, %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    titles = ["second pass"]
    for name in asked:
        titles += ["prior", _TITLES[name]] if name == "prior" else [_TITLES.get(name, name)]
        titles += ["same question"] if name == "shuffled" else []
    for title in titles:
        table.add_column(title, justify="right", no_wrap=title == "sufficiency", min_width=max(map(len, title.split())))
    rows = {**{source or "(no source)": numbers for source, numbers in by_source.items()}, "all": summary}
    for source, numbers in rows.items():
        if any(f"{name}_accuracy" in numbers for name in asked):
            table.add_row(Text(printable(source)), *_cells(numbers, asked))
    table.caption = "sufficiency: second pass minus prior"
    if "shuffled" in asked:
        table.caption += "; same question: of the descriptions that shuffled read"
    if {"reference", "other_question"} & set(asked):
        table.caption += "\nsecond reader, other question: of the samples that describe something"
    table.caption_justify = "left"
    console.print(table)


def _cells(numbers: Numbers, asked: list[str]) -> list[str]:
    cells = [percent(numbers["second_pass_accuracy"])]
    for name in asked:
        cells.append(percent(numbers.get(f"{name}_accuracy")))
        cells += [with_interval(numbers, gap_of(name))] if name == "prior" else []
        cells += [percent(numbers.get("shuffled_same_question"))] if name == "shuffled" else []
    return cells
