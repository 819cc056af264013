"""The page's sections about how runs were made: what differs in their settings, on which machines, in which time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_sr1.config.yaml_files import read_mapping
from megatron_sr1.report.runs import CONFIG_FILE, ReportedRun
from megatron_sr1.report.starts import STARTS_FILE, read_starts

PHASES = ("save", "sync", "rollout", "reward", "train", "step")  # of a step, in their order; SFT has the last alone
_SECONDS = "seconds/"
_ABSENT = "–"


def settings_of(run: ReportedRun, name: str = CONFIG_FILE) -> dict[str, str]:
    """By dotted key, texts as they are and all else as JSON; {} where the run has no such file."""
    path = run.path / name
    return _flat(read_mapping(path)) if path.is_file() else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, str) and value else json.dumps(_plain(value), ensure_ascii=False)
    return found


def _plain(value: Any) -> Any:
    """Of lists and mappings of other kinds those that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value


def differences_section(runs: Sequence[ReportedRun]) -> str:
    """A row for each key that the runs have otherwise, where they are several; and what was changed between the starts
    of each."""
    known = [run for run in runs if settings_of(run)]
    parts = ""
    if len(known) > 1:
        columns = [(run.name, settings_of(run)) for run in known]
        parts += (
            _differences("differences", columns) or '<p class="note">The runs differ in nothing but the folder.</p>'
        )
    for number, run in enumerate(known):
        older = sorted(run.path.glob("config.*.yaml"), key=lambda path: (len(path.name), path.name))
        if older:
            columns = [(path.name, _flat(read_mapping(path))) for path in older] + [(CONFIG_FILE, settings_of(run))]
            table = _differences(f"changes-{number}", columns)
            parts += f"<h3>{escape(run.name)}, from start to start</h3>{table}" if table else ""
    return f"<section><h2>What differs in the configuration</h2>{parts}</section>" if parts else ""


def _differences(name: str, columns: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    keys = dict.fromkeys(key for _, settings in columns for key in settings if key != "run_dir")
    rows = [
        [key, *(settings.get(key, _ABSENT) for _, settings in columns)]
        for key in keys
        if len({settings.get(key) for _, settings in columns}) > 1
    ]
    return _table(name, ["", *(label for label, _ in columns)], rows) if rows else ""


def machines_section(runs: Sequence[ReportedRun]) -> str:
    """On what each start of a run was made."""
    rows, fields = [], dict[str, None]()
    starts = [(run, start) for run in runs for start in read_starts(run.path)]
    for _, start in starts:
        fields |= dict.fromkeys(name for name in start if name not in ("step", "config"))
    for run, start in starts:
        step = _ABSENT if start["step"] is None else str(start["step"])
        rows.append([run.name, step, *(str(start.get(name, _ABSENT)) for name in fields)])
    without = [run.name for run in runs if not (run.path / STARTS_FILE).is_file()]
    note = f'<p class="note">Not noted of {escape(", ".join(without))}: no {STARTS_FILE}.</p>' if without else ""
    table = _table("machines", ["", "from step", *fields], rows) if rows else ""
    return f"<section><h2>Hardware and versions</h2>{table}{note}</section>" if table or note else ""


def times_section(runs: Sequence[ReportedRun]) -> str:
    """Median seconds of each phase of a step, and its share of their sum."""
    rows = []
    medians = {run.path: _medians(run) for run in runs}
    shown = [phase for phase in PHASES if any(phase in found for found in medians.values())]
    for run in runs:
        found, total = medians[run.path], sum(medians[run.path].values())
        if found:
            cells = [
                f"{found[p]:.3g} ({100 * found[p] / total:.0f} %)" if p in found and total else _ABSENT for p in shown
            ]
            rows.append([run.name, *cells, f"{total:.3g}", str(len(run.metrics))])
    if not rows:
        return ""
    note = (
        "Median over the steps, in seconds, and the share of their sum. The phases are one after another: save (the "
        "checkpoint), sync (weights to the engines), rollout (all passes), reward (grading beyond that), train."
    )
    table = _table("times", ["", *shown, "together", "steps"], rows)
    return f'<section><h2>Time by phase</h2><p class="note">{note}</p>{table}</section>'


def _medians(run: ReportedRun) -> dict[str, float]:
    values = {p: [v for e in run.metrics if (v := e.get(f"{_SECONDS}{p}")) is not None] for p in PHASES}
    return {phase: statistics.median(found) for phase, found in values.items() if found}


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table id="{name}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
