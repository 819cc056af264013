"""The page of what two objectives credit: tables, then samples with every token in the colour of its credit."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_sr1.report.credit.numbers import CreditReport, ShownResponse, ShownSample
from megatron_sr1.report.credit.tables import (
    SIDES,
    credit_tables,
    number,
    samples_table,
    signed,
    summary_lines,
    values,
)
from megatron_sr1.report.page import page
from megatron_sr1.report.text_table import table_section

FAINTEST, STRONGEST = 0.14, 0.7  # of a colour: the least credit that is not 0, and the most on the page


def write_credit(report: CreditReport, out: Path) -> None:
    """Writes the page to `out`; its folder is made where missing."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in summary_lines(report))
    tables = [*credit_tables(report), samples_table(report)]
    sections = (
        f"<section><h2>What is compared</h2>{lines}</section>",
        *(table_section(table, "credit") for table in tables if table.lines),
        _samples_section(report),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(f"credit of step {report.step}, {Path(report.run).name}", sections), encoding="utf-8")


def _samples_section(report: CreditReport) -> str:
    if not report.samples:
        return '<section><h2>Samples</h2><p class="note">No sample has another credit.</p></section>'
    pieces = [piece for one in report.samples for response in one.responses for piece in response.pieces]
    most = [max((abs(piece.credits[side]) for piece in pieces), default=0.0) for side in range(2)]
    cards = "".join(_card(sample, most) for sample in report.samples)
    note = (
        "The largest change first. A token is green where its credit is positive, so that it becomes more likely, and "
        f"red where it is negative; grey: 0. The strongest colour is {number(most[0])} under A and {number(most[1])} "
        "under B. Images are not saved with rollouts."
    )
    return f'<section><h2>Samples</h2><p class="note">{note}</p>{cards}</section>'


def _card(sample: ShownSample, most: Sequence[float]) -> str:
    rewards = ", ".join(f"{name} {value:g}" for name, value in sample.rewards.items())
    sides = "".join(
        f"<dt>{letter}</dt><dd>credit {signed(credit)}; advantages: {escape(values(advantages))}</dd>"
        for letter, credit, advantages in zip(SIDES, sample.credits, sample.advantages, strict=True)
    )
    responses = "".join(_response(response, most) for response in sample.responses)
    return (
        f'<article class="credited" id="sample-{escape(sample.key)}-{sample.sample}">'
        f"<h3>{escape(sample.key)} #{sample.sample} <small>change {number(sample.change)}</small></h3>"
        f"<p><b>{escape(sample.problem)}</b></p><p>Correct answer: <b>{escape(sample.answer)}</b></p>"
        f'<p class="note">{escape(rewards)}</p><dl>{sides}</dl>{responses}</article>'
    )


def _response(response: ShownResponse, most: Sequence[float]) -> str:
    name = f"{response.pass_name} pass" + (f", sample {response.number}" if response.number else "")
    cut = ", cut by the token limit" if response.cut else ""
    blocks = "".join(
        f"<div><h4>under {letter}: {signed(response.credits[side])}</h4>"
        f"<pre>{_tokens(response, side, most[side])}</pre></div>"
        for side, letter in enumerate(SIDES)
    )
    head = f"<h4>{escape(name)}, {response.num_tokens} tokens{cut}</h4>"
    return f'{head}<div class="sides">{blocks}</div>'


def _tokens(response: ShownResponse, side: int, most: float) -> str:
    found = ""
    for piece in response.pieces:
        credit = piece.credits[side]
        kind = "gain" if credit > 0 else "loss" if credit < 0 else "none"
        strength = FAINTEST + (STRONGEST - FAINTEST) * abs(credit) / most if credit else 0.0
        style = f' style="--strength: {100 * strength:.0f}%"' if credit else ""
        found += f'<span class="{kind}" title="{signed(credit)} a token"{style}>{escape(piece.text)}</span>'
    return found
