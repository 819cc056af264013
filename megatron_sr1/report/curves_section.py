"""The page's curves: runs that differ in nothing but their seed are drawn as one, with their spread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from megatron_sr1.report.plots import CHARTS, Chart, draw_chart
from megatron_sr1.report.runs import ReportedRun
from megatron_sr1.report.settings_sections import settings_of

_OF_SEED = ("seed", "run_dir", "track")  # keys, and sections, that tell seeds of one configuration apart
MOST_TOGETHER = 4  # groups in one chart, each with a line style of its own


def curves_section(runs: Sequence[ReportedRun]) -> str:
    """HTML of all charts: of few groups together, of many one below another."""
    groups = seed_groups([run for run in runs if run.metrics])
    together = len(groups) <= MOST_TOGETHER
    blocks = ""
    for number, part in enumerate([groups] if together else [[group] for group in groups]):
        labels = [group_label(group, groups) for group in part]
        figures = "".join(_chart(part, labels, chart) for chart in CHARTS)
        heading = "" if together else f"<h3>{escape(group_label(groups[number], groups))}</h3>"
        blocks += f'{heading}<div class="charts">{figures}</div>' if figures else ""
    seeds = any(len(group) > 1 for group in groups)
    note = "Runs that differ in their seed alone are one line, their mean; the band is one sample standard deviation."
    told = f'<p class="note">{note}</p>' if seeds else ""
    return f"<section><h2>Training</h2>{told}{blocks or '<p class=note>No training step yet.</p>'}</section>"


def seed_groups(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Runs of one configuration but for the seed, in the order of their first; a run without one is alone. Where two
    have one seed they are no sample of seeds: then each of them is alone."""
    groups: dict[str, list[ReportedRun]] = {}
    for number, run in enumerate(runs):
        settings = {k: v for k, v in settings_of(run).items() if k.partition(".")[0] not in _OF_SEED}
        groups.setdefault(json.dumps(settings, sort_keys=True) if settings else str(number), []).append(run)
    found: list[list[ReportedRun]] = []
    for group in groups.values():
        seeds = {settings_of(run).get("seed") for run in group}
        found += [group] if len(seeds) == len(group) else [[run] for run in group]
    return found


def group_label(group: Sequence[ReportedRun], groups: Sequence[Sequence[ReportedRun]]) -> str:
    """The preset, where no other group has it, else the folder of the first; with the number of seeds."""
    preset = group[0].preset
    alone = preset and sum(one[0].preset == preset for one in groups) == 1
    name = preset if alone else group[0].name
    return f"{name} ({len(group)} seeds)" if len(group) > 1 else name


def _chart(groups: Sequence[Sequence[ReportedRun]], labels: Sequence[str], chart: Chart) -> str:
    light, dark = (draw_chart(groups, labels, chart, theme) for theme in ("light", "dark"))
    return "" if light is None or dark is None else figure(chart.title, light, dark)


def figure(title: str, light: str, dark: str) -> str:
    """A chart in both themes, each a data address."""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><picture>"
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(title)} over training steps"></picture></figure>'
    )
