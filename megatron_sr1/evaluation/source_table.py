"""The table of an evaluation in the terminal: a row per source and one for all, in percent."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sr1.evaluation.percent import percent, with_interval
from megatron_sr1.evaluation.summary import Numbers
from megatron_sr1.printable import printable

_COLUMNS = (  # (number, title)
    ("accuracy", "accuracy"),
    ("second_pass_accuracy", "second pass"),
    ("language_shortcut_rate", "LSR"),
    ("language_shortcut_rate_judged", "LSR, judged"),
    ("leak", "leak"),
    ("format", "format"),
    ("first_truncated", "cut"),
)
_YES_NO_COLUMNS = (
    ("accuracy", "accuracy"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("f1", "F1"),
    ("yes_ratio", "yes"),
    ("undecided", "neither"),
    ("question_pair_accuracy", "qAcc"),
    ("figure_accuracy", "fAcc"),
)


def print_sources(console: Console, summary: Numbers, by_source: Mapping[str, Numbers]) -> None:
    """Prints accuracy with its 95 % interval, the other shares that were measured, pass@k, tokens and prompts; and a
    second table of the sources of yes-or-no questions, if there are any."""
    shares = [(name, title) for name, title in _COLUMNS if summary.get(name) is not None]
    passes = [name for name in summary if name.startswith("pass@") and name != "pass@1"]
    table = Table(title="By source, %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for title in (*(title for _, title in shares), *passes, "tokens", "prompts"):
        table.add_column(title, justify="right", no_wrap=title == "accuracy", min_width=max(map(len, title.split())))
    rows = {**{source or "(no source)": numbers for source, numbers in by_source.items()}, "all": summary}
    for name, numbers in rows.items():
        cells = [
            with_interval(numbers, share) if share == "accuracy" else percent(numbers[share]) for share, _ in shares
        ]
        tokens = "–" if numbers["first_tokens"] is None else f"{numbers['first_tokens']:.0f}"
        passing = [percent(numbers.get(share)) for share in passes]
        table.add_row(Text(printable(name)), *cells, *passing, tokens, f"{numbers['num_prompts']:.0f}")
    if summary["macro_accuracy"] is not None and sum("/" not in source for source in by_source) > 1:
        table.caption = f"mean accuracy of the benchmarks, each counted the same: {percent(summary['macro_accuracy'])}"
        table.caption_justify = "left"
    console.print(table)
    asked = {name: numbers for name, numbers in rows.items() if "undecided" in numbers}
    if asked:
        console.print(_yes_no_table(asked))


def _yes_no_table(rows: Mapping[str, Numbers]) -> Table:
    table = Table(title="Questions of yes or no, %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    shown = [
        (name, title) for name, title in _YES_NO_COLUMNS if any(name in numbers for numbers in rows.values())
    ]  # also where it is defined nowhere: that tells something, too
    for _, title in shown:
        table.add_column(title, justify="right", min_width=len(title))
    table.add_column("prompts", justify="right")
    for source, numbers in rows.items():
        table.add_row(
            Text(printable(source)), *(percent(numbers.get(name)) for name, _ in shown), f"{numbers['num_prompts']:.0f}"
        )
    table.caption = "neither: an answer that is neither yes nor no; it is wrong"
    if any(name == "precision" for name, _ in shown):
        table.caption += "\nprecision, recall, F1: of yes in POPE, of no in AMBER"
    table.caption_justify = "left"
    return table
