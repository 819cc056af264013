"""The page's table of what the second pass is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from megatron_sr1.report.summary_table import SummaryRow, percent

CONTROL_COLUMNS = (  # (number, title, meaning)
    ("second_pass_accuracy", "second pass", "the description alone leads to the correct answer"),
    ("prior_accuracy", "prior", "the question alone does"),
    ("sufficiency", "sufficiency", "second pass minus prior: what the descriptions add to the questions"),
    ("shuffled_accuracy", "shuffled", "the description of another image does, of the same question where there is one"),
    ("shuffled_same_question", "same question", "share of these descriptions that were made for the same question"),
    ("gold_accuracy", "gold", "what is known of the image does, where it is known"),
    ("reference_accuracy", "second reader", "the description does, read by the weights of the start"),
    ("other_question_accuracy", "other question", "the description does, of another question about the same image"),
)


def controls_section(rows: Sequence[SummaryRow]) -> str:
    """A row for each evaluation that has asked controls; empty where none has."""
    asked = [row for row in rows if any(row.values.get(name) is not None for name, _, _ in CONTROL_COLUMNS[1:])]
    if not asked:
        return ""
    shown = [column for column in CONTROL_COLUMNS if any(row.values.get(column[0]) is not None for row in asked)]
    head = "".join(f'<th title="{escape(meaning)}">{escape(title)}</th>' for _, title, meaning in shown)
    body = "".join(
        f"<tr><th>{escape(row.label)} <small>step {row.step}</small></th>"
        + "".join(f"<td>{_cell(row, name)}</td>" for name, _, _ in shown)
        + "</tr>"
        for row in asked
    )
    meanings = "".join(f"<dt>{escape(title)}</dt><dd>{escape(meaning)}</dd>" for _, title, meaning in shown)
    return (
        '<section><h2>Controls of the second pass</h2><p class="note">Percent of the samples that each was asked for; '
        'small: 95 % interval.</p><div class="scroll"><table id="controls">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<details><summary>What the columns mean</summary><dl>{meanings}</dl></details></section>"
    )


def _cell(row: SummaryRow, name: str) -> str:
    low, high = row.values.get(f"{name}_low"), row.values.get(f"{name}_high")
    value = percent(row.values.get(name))
    return value if low is None or high is None else f"{value} <small>{percent(low)} – {percent(high)}</small>"
