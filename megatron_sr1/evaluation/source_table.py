"""The table of an evaluation in the terminal: a row per source and one for all, in percent."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sr1.evaluation.summary import Numbers

_COLUMNS = (  # (number, title)
    ("accuracy", "accuracy"),
    ("second_pass_accuracy", "second pass"),
    ("language_shortcut_rate", "LSR"),
    ("language_shortcut_rate_judged", "LSR, judged"),
    ("leak", "leak"),
    ("format", "format"),
    ("first_truncated", "cut"),
)


def print_sources(console: Console, summary: Numbers, by_source: Mapping[str, Numbers]) -> None:
    """Prints accuracy with its 95 % interval, the other shares that were measured, pass@k, tokens and prompts."""
    shares = [(name, title) for name, title in _COLUMNS if summary.get(name) is not None]
    passes = [name for name in summary if name.startswith("pass@") and name != "pass@1"]
    table = Table(title="By source, %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for title in (*(title for _, title in shares), *passes, "tokens", "prompts"):
        table.add_column(title, justify="right", no_wrap=title == "accuracy", min_width=max(map(len, title.split())))
    rows = {**{source or "(no source)": numbers for source, numbers in by_source.items()}, "all": summary}
    for name, numbers in rows.items():
        cells = [
            _with_interval(numbers, share) if share == "accuracy" else _percent(numbers[share]) for share, _ in shares
        ]
        tokens = "–" if numbers["first_tokens"] is None else f"{numbers['first_tokens']:.0f}"
        passing = [_percent(numbers.get(share)) for share in passes]
        table.add_row(Text(name), *cells, *passing, tokens, f"{numbers['num_prompts']:.0f}")
    if summary["macro_accuracy"] is not None and sum("/" not in source for source in by_source) > 1:
        table.caption = f"mean accuracy of the benchmarks, each counted the same: {_percent(summary['macro_accuracy'])}"
        table.caption_justify = "left"
    console.print(table)


def _with_interval(numbers: Numbers, name: str) -> str:
    return f"{_percent(numbers[name])} [{_percent(numbers[f'{name}_low'])}, {_percent(numbers[f'{name}_high'])}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
