"""A page of the viewer, made by hand: no model, no tokenizer, no run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from megatron_sr1.report.runs import ReportedRun
from megatron_sr1.report.viewer.images import image_stem, put_images
from megatron_sr1.report.viewer.shown import (
    RunToShow,
    SetToShow,
    ShownGroup,
    ShownResponse,
    ShownSample,
    ShownSet,
    ShownStream,
)
from megatron_sr1.report.viewer.write import write_page
from tests.test_report import EVIL

STREAMS = (
    ShownStream("answer", "first", "response", "1 acc", 0.5),
    ShownStream("visual", "second", "response", "1 acc_vis", 0.5),
    ShownStream("told", "first", "description", "1 leak", 1.0, unknown="kl_in=reward was not saved"),
)
ABSENT = {"entropy": "entropy is not saved"}
MEASURES = {"gap": "log-prob gap, trainer − generator", "dependency/blind": "visual dependency, blind"}
TOKENS = ("<description>", " 3 ", "𝟛", "</description>", " so ", "\\boxed{3}", "<|end|>")
STEPS, GROUPS, SAMPLES = 3, 4, 3


def a_page(folder: Path) -> Path:
    """Of two runs, the second with an evaluation alone."""
    runs = [ReportedRun(folder / name, "", "", (), ()) for name in ("first <run>", "second")]

    def viewed(run: ReportedRun, image_folder: Path) -> RunToShow:
        if run.name == "second":
            return RunToShow(run.name, [SetToShow("after", "evaluation after", "evaluation", 2, _evaluation)])
        broken = SetToShow("9", "step 9", "step", 9, _broken)
        steps = [
            SetToShow(str(step), f"step {step}", "step", step, lambda step=step: _set(step, image_folder))
            for step in range(STEPS)
        ]
        return RunToShow(run.name, [*steps, broken], left_out=(4, 5))

    out = folder / "page with #" / "report.html"
    problems = write_page("made <by> hand", ["<section><h2>Curves</h2></section>"], runs, viewed, out)
    assert problems == ["first <run>, step 9: part 1 of 2 is missing"]
    return out


def _broken() -> ShownSet:
    raise ValueError("part 1 of 2 is missing")


def _evaluation() -> ShownSet:
    absent = dict.fromkeys(
        ("advantage", "opposite", "dead", "dropped", "surprise", "gap"), "an evaluation trains nothing"
    )
    response = ShownResponse("first", 0, EVIL, False, 5)
    sample = ShownSample(0, (response,), None, {"acc": 0.0}, {}, frozenset({"undescribed"}))
    group = ShownGroup(7, "own-2/2", f"What of 2? {EVIL}", "1", (sample,), no_images="they are gone")
    return ShownSet((), absent, (), [group, ShownGroup(8, "own-2/1", "Another?", "1", (sample,))])


def _set(step: int, image_folder: Path) -> ShownSet:
    return ShownSet(STREAMS, ABSENT, (f"Prompt 9 was skipped: {EVIL}",), _groups(step, image_folder), MEASURES)


def _groups(step: int, image_folder: Path) -> Iterator[ShownGroup]:
    for number in range(GROUPS):
        key = f"{'same' if number == 0 else f'own-{step}'}/{number}"
        images = [Image.new("RGB", (40, 30), (60 * number, 90, 120)) for _ in range(number % 3)]
        names = put_images(image_stem(key), images, image_folder)
        samples = tuple(_sample(step, number, sample) for sample in range(SAMPLES))
        reason = "" if names else "the prompt has no image"
        yield ShownGroup(
            number, key, f"What of {number}? {EVIL}", f"<b>{number}</b>", samples, names, reason, "<|user|> What?"
        )


def _sample(step: int, group: int, number: int) -> ShownSample:
    advantage = [1.5, -0.5, 0.0][number]
    surprise = (0.0, 4.0, 1.0, 0.1, 9.0, math.inf if (group, number) == (3, 2) else 0.2, 0.0)
    masks = (0b101, 0b101, 0b101, 0b101, 0b001, 0b001, 0)
    text = "".join(TOKENS)
    first = ShownResponse(
        *("first", 0, text, number == 2, len(TOKENS), TOKENS, surprise, masks, (advantage, None, None)),
        blocks=(("description", 0, text.index(" so ")), ("answer", text.index("\\"), text.index("<|"))),
        right=number == 0,
        facts={"seconds": "1.5"},
        measures={"gap": (0.0, -1.0, 0.5, 0.0, 0.0, 0.0, 0.01 * group), "dependency/blind": (number - 1.0,) * 7},
    )
    second = ShownResponse("second", 0, EVIL, False, 3, advantages=(None, -advantage, None), right=number == 1)
    reader = ShownResponse("reader", 1, "", False, None, context="another text", question=("Which?", "<i>7</i>"))
    rewards = {"acc": float(number == 0), "acc_vis": float(number == 1), "mine.py:long@reader": [0.5, math.nan]}
    filters = {"opposite", *(["shortcut"] if number == 0 else []), *(["cut", "gap"] if number == 2 else [])}
    advantages = {"answer": advantage, "visual": -advantage, "told": None}
    responses = (first, second, reader) if number < 2 else (first,)
    description = " 3 𝟛" if number < 2 else None
    return ShownSample(number, responses, description, rewards, advantages, frozenset(filters), {"image": "noisy"})
