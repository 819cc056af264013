"""The report of a sweep: tables, curves with their spread, and the runs it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megatron_sr1.report.curves_section import figure
from megatron_sr1.report.page import config_section, summary_section
from megatron_sr1.report.settings_sections import machines_section, times_section
from megatron_sr1.report.summary_table import comparison_rows
from megatron_sr1.report.sweep.bands import band_names, draw_bands
from megatron_sr1.report.sweep.files import write_sweep_files
from megatron_sr1.report.sweep.groups import GroupRow, RunGroup, sweep_rows
from megatron_sr1.report.sweep.tables import notes, text_tables
from megatron_sr1.report.text_table import table_section
from megatron_sr1.report.viewer.write import Viewed, viewed_evaluations, write_page


@dataclass(frozen=True)
class WrittenSweep:
    """What the report of a sweep has found."""

    rows: list[GroupRow]
    problems: list[str]  # what of the rollouts and evaluations could not be read


def write_sweep_report(
    groups: Sequence[RunGroup], folder: Path, out: Path | None = None, viewed: Viewed = viewed_evaluations
) -> WrittenSweep:
    """Writes the page, sweep.md, sweep.csv and sweep.json.

    Args:
        groups: the first is what the others are compared with.
        folder: of the sweep.
        out: the page; `<folder>/report.html` by default.
        viewed: what the viewer shows of a run.

    Raises:
        ValueError: no run has made a step yet, or a damaged file in one.
    """
    rows = sweep_rows(groups)
    runs = [run for row in rows for run in row.runs.values()]
    if not runs:
        raise ValueError(f"no run of the sweep in {folder} has made a step yet. Start it: megatron-sr1 sweep.")
    sections = (
        "".join(table_section(table, "sweep") for table in text_tables(rows)),
        "".join(f'<p class="note">{escape(note)}</p>' for note in notes(rows)),
        _curves_section(rows),
        summary_section(comparison_rows(runs), "Every run"),
        times_section(runs),
        machines_section(runs),
        config_section(runs),
    )
    out = out or folder / "report.html"
    problems = write_page(f"sweep {folder.name}", sections, runs, viewed, out)
    write_sweep_files(rows, folder)
    return WrittenSweep(rows, problems)


def _curves_section(rows: Sequence[GroupRow]) -> str:
    figures = "".join(
        figure(name, draw_bands(rows, name, "light"), draw_bands(rows, name, "dark")) for name in band_names(rows)
    )
    note = "Mean over the seeds (their number in parentheses); the band is one sample standard deviation each way."
    return f'<section><h2>Training</h2><p class="note">{note}</p><div class="charts">{figures}</div></section>'
