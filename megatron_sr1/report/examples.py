"""The examples of the page: image, question, both passes, the correct answer and each reward."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_sr1.report.runs import Example, ReportedRun

RIGHT_FROM = 0.5  # a reward in [0, 1] is marked right from here
PENALTIES = ("leak",)  # of these less is better


def examples_section(runs: Sequence[ReportedRun]) -> str:
    """HTML of the last evaluation's examples of each run, each with its earlier self where that was kept."""
    blocks = ""
    evaluated = [run for run in runs if run.evaluations]
    for run in evaluated:
        last, earlier = run.evaluations[-1], run.evaluations[:-1]
        start = {example.key: example for example in earlier[0].examples} if earlier else {}
        start_label = earlier[0].label if earlier else ""
        cards = "".join(_card(e, start.get(e.key), start_label) for e in last.examples)
        heading = f"<h3>{escape(run.name)}</h3>" if len(evaluated) > 1 else ""
        blocks += f'{heading}<div class="cards">{cards}</div>' if cards else ""
    return f"<section><h2>Examples</h2>{blocks}</section>" if blocks else ""


def _card(example: Example, start: Example | None, start_label: str) -> str:
    images = "".join(
        f'<img class="sample" src="{data_address(path)}" alt="image of the question">' for path in example.images
    )
    before = ""
    if start is not None:
        before = f"<details><summary>{escape(start_label)}</summary>{_marks(start)}{_passes(start)}</details>"
    return (
        f'<article id="example-{escape(example.key)}"><div class="question"><div>{images}</div><div>'
        f"<p><b>{escape(example.problem)}</b></p><p>Correct answer: <b>{escape(example.answer)}</b></p>"
        f"{_marks(example)}</div></div>{_passes(example)}{before}</article>"
    )


def _marks(example: Example) -> str:
    marks = [
        _mark(name, (value < RIGHT_FROM) if name in PENALTIES else (value >= RIGHT_FROM), f"{value:g}")
        for name, value in example.rewards.items()
    ]
    if example.faithful is not None:
        marks.append(_mark("faithful", example.faithful, ""))
    return f'<p class="marks">{"".join(marks)}</p>'


def _mark(name: str, right: bool, value: str) -> str:
    kind, sign = ("right", "✓") if right else ("wrong", "✗")
    return f'<span class="{kind}">{sign} {escape(name)} {escape(value)}</span>'


def _passes(example: Example) -> str:
    description = "no description" if example.description is None else example.description
    second = "not run: there is no description to reason from" if example.second is None else example.second
    blocks = (
        ("First pass, with the image", example.first),
        ("Description", description),
        ("Second pass, description only", second),
    )
    return "".join(f"<h4>{title}</h4><pre>{escape(text)}</pre>" for title, text in blocks)


def data_address(path: Path) -> str:
    """The image as a data address.

    Raises:
        ValueError: the name does not end like an image's.
    """
    kind, _ = mimetypes.guess_type(path.name)
    if kind is None or not kind.startswith("image/"):
        raise ValueError(f"{path} is not an image file by its name: use .png, .jpg or .webp.")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
