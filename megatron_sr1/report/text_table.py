"""A table as cells of text, for the terminal and the page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_ANY_WIDTH = 10_000  # columns of text


@dataclass(frozen=True)
class TextTable:
    """One table; the first cell of a line is its label."""

    key: str
    title: str  # and behind a semicolon what its numbers are
    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def print_text_table(console: Console, table: TextTable) -> None:
    """Prints it, with its title above. Where it does not fit it is folded as far as words allow, and then as wide as that
    is: no column is cut off in a file, or a narrow terminal."""
    console.print(table.title, style="italic", markup=False, highlight=False, soft_wrap=True)
    drawn = Table(box=SIMPLE_HEAD)
    for number, title in enumerate(table.head):
        longest_word = max(
            [len(word) for line in (table.head, *table.lines) for word in line[number].split()], default=0
        )
        drawn.add_column(Text(title), justify="right" if number else "left", no_wrap=not number, min_width=longest_word)
    for line in table.lines:
        drawn.add_row(*map(Text, line))
    least = console.measure(drawn, options=console.options.update(max_width=_ANY_WIDTH)).minimum
    console.print(drawn, width=max(console.width, least), crop=False, no_wrap=False)


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
