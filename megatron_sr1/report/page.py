"""The HTML page: tables, curves and the viewer, without anything from outside. Model text is always escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from megatron_sr1.report.controls_section import controls_section
from megatron_sr1.report.curves_section import curves_section
from megatron_sr1.report.demonstrations import demonstrations_section
from megatron_sr1.report.runs import ReportedRun, read_run
from megatron_sr1.report.settings_sections import differences_section, machines_section, times_section
from megatron_sr1.report.summary_table import COLUMNS, SummaryColumn, SummaryRow, comparison_rows, percent
from megatron_sr1.report.viewer.write import Viewed, viewed_evaluations, write_page


@dataclass(frozen=True)
class Written:
    """What a report has found."""

    rows: list[SummaryRow]  # of its table
    problems: list[str]  # what of the rollouts and evaluations could not be read


def write_report(run_dirs: Sequence[Path], out: Path, viewed: Viewed = viewed_evaluations) -> Written:
    """Writes the report of the runs to `out`, and where its data are large a folder beside it.

    Args:
        run_dirs: run folders (see `find_runs`), in the order they are to be shown.
        out: the HTML file; its folder is made where missing.
        viewed: what the viewer shows of a run.

    Raises:
        ValueError: no run given, a damaged file in one, or see `viewed`.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run folder.")
    runs = [read_run(path) for path in run_dirs]
    rows = comparison_rows(runs)
    sections = (
        summary_section(rows),
        controls_section(rows),
        _sources_section(rows),
        curves_section(runs),
        demonstrations_section(runs),
        times_section(runs),
        machines_section(runs),
        differences_section(runs),
        config_section(runs),
    )
    title = " · ".join(run.name for run in runs)
    return Written(rows, write_page(title, sections, runs, viewed, out))


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


def config_section(runs: Sequence[ReportedRun]) -> str:
    """The resolved configuration of each run, folded."""
    blocks = "".join(
        f"<details><summary>{escape(str(run.path))}</summary><pre>{escape(run.config_text)}</pre></details>"
        for run in runs
        if run.config_text
    )
    return f"<section><h2>Configuration</h2>{blocks}</section>" if blocks else ""
