"""The HTML page: table, curves and examples in one file without external assets. Model text is always escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from megatron_sr1.report.controls_section import controls_section
from megatron_sr1.report.demonstrations import demonstrations_section
from megatron_sr1.report.examples import examples_section
from megatron_sr1.report.plots import CHARTS, Chart, draw_chart
from megatron_sr1.report.runs import ReportedRun, read_run
from megatron_sr1.report.summary_table import COLUMNS, SummaryColumn, SummaryRow, comparison_rows, percent


def write_report(run_dirs: Sequence[Path], out: Path) -> list[SummaryRow]:
    """Writes the report of the runs to `out` and returns the rows of its table.

    Args:
        run_dirs: run folders (see `find_runs`), in the order they are to be shown.
        out: the HTML file; its folder is made where missing.

    Raises:
        ValueError: no run given, or a damaged file in one.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run folder.")
    runs = [read_run(path) for path in run_dirs]
    rows = comparison_rows(runs)
    tables = (summary_section(rows), controls_section(rows), _sources_section(rows))
    sections = (*tables, _curves_section(runs), demonstrations_section(runs), examples_section(runs))
    title = " · ".join(run.name for run in runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(title, (*sections, config_section(runs))), encoding="utf-8")
    return rows


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document around its sections."""
    style = files("megatron_sr1.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Megatron-SR1 report: {escape(title)}</title><style>{style}</style></head><body><main>"
        f"<header><p>Megatron-SR1 report</p><h1>{escape(title)}</h1></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def summary_section(rows: Sequence[SummaryRow], title: str = "Held-out evaluation") -> str:
    """The table of evaluations, with what its columns mean."""
    if not rows:
        return f'<section><h2>{title}</h2><p class="note">No evaluation yet.</p></section>'
    head = "".join(f'<th title="{escape(c.meaning)}">{escape(c.title)} {_arrow(c)}</th>' for c in COLUMNS)
    body = "".join(
        f"<tr><th>{escape(row.label)} <small>step {row.step}</small></th>"
        + "".join(_cell(column, row, rows[0]) for column in COLUMNS)
        + f"<td>{row.num_prompts}</td></tr>"
        for row in rows
    )
    meanings = "".join(f"<dt>{escape(c.title)}</dt><dd>{escape(c.meaning)}</dd>" for c in COLUMNS)
    return (
        f"<section><h2>{title}</h2>"
        '<p class="note">Percent of the prompts, greedy decoding; small: difference to the first row, in points.</p>'
        f'<div class="scroll"><table id="summary"><thead><tr><th></th>{head}<th>prompts</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div><details><summary>What the columns mean</summary><dl>{meanings}</dl>"
        "</details></section>"
    )


def _arrow(column: SummaryColumn) -> str:
    return "↑" if column.higher_is_better else "↓"


def _cell(column: SummaryColumn, row: SummaryRow, base: SummaryRow) -> str:
    value, start = row.values[column.key], base.values[column.key]
    if row is base or value is None or start is None:
        return f"<td>{percent(value)}</td>"
    change = 100 * (value - start)
    kind = "same" if abs(change) < 0.05 else "good" if (change > 0) == column.higher_is_better else "bad"
    return f'<td>{percent(value)} <small class="{kind}">{change:+.1f}</small></td>'


def _sources_section(rows: Sequence[SummaryRow]) -> str:
    sources = sorted({source for row in rows for source in row.by_source})
    if not sources:
        return ""
    head = "".join(f"<th>{escape(row.label)}</th>" for row in rows)
    body = ""
    for source in sources:
        found = [row.by_source.get(source) for row in rows]
        counts = {int(f["num_prompts"] or 0) for f in found if f is not None}
        cells = "".join(f"<td>{percent(f['accuracy'] if f is not None else None)}</td>" for f in found)
        body += f"<tr><th>{escape(source)}</th>{cells}<td>{' / '.join(map(str, sorted(counts)))}</td></tr>"
    return (
        '<section><h2>Accuracy by kind of question</h2><div class="scroll"><table id="sources">'
        f"<thead><tr><th></th>{head}<th>prompts</th></tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _curves_section(runs: Sequence[ReportedRun]) -> str:
    trained = [run for run in runs if run.metrics]
    groups = [trained] if len({run.preset for run in trained}) == len(trained) else [[run] for run in trained]
    blocks = ""
    for group in groups:
        labels = [run.preset or run.name for run in group]
        figures = "".join(_chart(group, labels, chart) for chart in CHARTS)
        heading = f"<h3>{escape(group[0].name)}</h3>" if len(groups) > 1 else ""
        blocks += f'{heading}<div class="charts">{figures}</div>'
    return f"<section><h2>Training</h2>{blocks or '<p class=note>No training step yet.</p>'}</section>"


def _chart(runs: Sequence[ReportedRun], labels: Sequence[str], chart: Chart) -> str:
    light, dark = (draw_chart(runs, labels, chart, theme) for theme in ("light", "dark"))
    return "" if light is None or dark is None else figure(chart.title, light, dark)


def figure(title: str, light: str, dark: str) -> str:
    """A chart in both themes, each a data address."""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><picture>"
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(title)} over training steps"></picture></figure>'
    )


def config_section(runs: Sequence[ReportedRun]) -> str:
    """The resolved configuration of each run, folded."""
    blocks = "".join(
        f"<details><summary>{escape(str(run.path))}</summary><pre>{escape(run.config_text)}</pre></details>"
        for run in runs
        if run.config_text
    )
    return f"<section><h2>Configuration</h2>{blocks}</section>" if blocks else ""
