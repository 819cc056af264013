"""Held-out demonstrations of a cold start, each with the loss that the policy has of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_sr1.report.runs import ReportedRun

_FILE = "heldout.json"  # as `training.heldout_loss` writes it


def demonstrations_section(runs: Sequence[ReportedRun]) -> str:
    """HTML of those that the last measurement of each run has told; "" where there are none.

    Raises:
        ValueError: a file is damaged.
    """
    blocks = ""
    for run in runs:
        path = run.path / _FILE
        if path.is_file():
            heading = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
            blocks += heading + _table(path)
    return f"<section><h2>Held-out demonstrations</h2>{blocks}</section>" if blocks else ""


def _table(path: Path) -> str:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = "".join(
            f"<tr><th>{escape(one['key'])}</th><td>{_loss(one['loss'])}</td>"
            f"<td>{one['tokens']:d}</td><td>{escape(one['template'])}</td><td>{escape(one['problem'])}</td>"
            f"<td>{escape(one['response'])}</td></tr>"
            for one in tree["examples"]
        )
        step = int(tree["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it; the run writes it anew.") from error
    head = "".join(f"<th>{name}</th>" for name in ("", "loss", "tokens", "template", "question", "response"))
    return (
        f'<p class="note">After step {step}: mean loss of the tokens of each response, nats.</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
