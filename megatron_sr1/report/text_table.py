"""A table as cells of text, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sr1.printable import printable


@dataclass(frozen=True)
class TextTable:
    """One table; the first cell of a line is its label."""

    key: str
    title: str  # and behind a semicolon what its numbers are
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def print_text_table(console: Console, table: TextTable) -> None:
    """Prints it, with its title above. Where it does not fit it is folded as far as words allow, and is as wide as that
    takes: no column is cut off in a file, or in a narrow terminal."""
    lines = tuple(tuple(map(printable, line)) for line in table.lines)
    table = TextTable(table.key, printable(table.title), tuple(map(printable, table.head)), lines)
    console.print(table.title, style="italic", markup=False, highlight=False, soft_wrap=True)
    columns = [[line[number] for line in (table.head, *table.lines)] for number in range(len(table.head))]
    folds = _width(columns) > console.width
    if folds:  # a label stays in one line, of other cells every word does
        columns = [columns[0], *([word for cell in column for word in cell.split()] for column in columns[1:])]
    drawn = Table(box=SIMPLE_HEAD)
    for number, (title, texts) in enumerate(zip(table.head, columns, strict=True)):
        justify = "right" if number else "left"
        drawn.add_column(Text(title), justify=justify, width=max(map(len, texts), default=0) or None)
    for line in table.lines:
        drawn.add_row(*map(Text, line))
    width = console.width
    console.width = max(width, _width(columns))
    console.print(drawn)
    console.width = width


def _width(columns: Sequence[Sequence[str]]) -> int:
    """Of a table with these texts in its columns: each has a space on either side and one before the next."""
    return 1 + sum(max(map(len, texts), default=0) + 3 for texts in columns)


def table_section(table: TextTable, prefix: str) -> str:
    """HTML of it; its id is the prefix and its key."""
    head = "".join(f"<th>{escape(title)}</th>" for title in table.head)
    body = "".join(
        f"<tr><th>{escape(line[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:]) + "</tr>"
        for line in table.lines
    )
    title, _, unit = table.title.partition("; ")
    return (
        f'<section><h2>{escape(title)}</h2><p class="note">{escape(unit)}</p><div class="scroll">'
        f'<table id="{prefix}-{table.key}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )
