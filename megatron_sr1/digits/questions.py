"""Questions about a row of digits, their answers, and worked demonstrations of both passes.

The text of a question says nothing about the picture: the answer must be read off the digits. Differences are drawn
uniformly from 0-9, so that no constant answer is right more often than one time in ten; sums keep the distribution of
the sum of two or three digits. Every kind needs every digit: an answer that is right by luck while a digit was misread
would reward an unfaithful description.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from megatron_sr1.digits.images import Split, compose, load_scans
from megatron_sr1.types import Prompt, SftSample

NUM_DIGITS = {2: 0.75, 3: 0.25}  # how many digits a picture holds -> how often
Digits = tuple[int, ...]


@dataclass(frozen=True)
class QuestionKind:
    """One kind of question: its text, its answer and the reasoning that leads there."""

    problem: str
    answer: Callable[[Digits], int | str]
    reasoning: Callable[[Digits], str]
    uniform_answer: bool  # draw the answer uniformly from 0-9, then digits that give it


def _reason_sum(digits: Digits) -> str:
    return f"{' + '.join(map(str, digits))} = {sum(digits)}"


def _reason_difference(digits: Digits) -> str:
    return f"{max(digits)} - {min(digits)} = {max(digits) - min(digits)}"


def _number(digits: Digits) -> str:
    return "".join(map(str, digits))


KINDS: Mapping[str, QuestionKind] = {
    "sum": QuestionKind("What is the sum of all digits?", sum, _reason_sum, uniform_answer=False),
    "difference": QuestionKind(
        "What is the largest digit minus the smallest digit?",
        lambda digits: max(digits) - min(digits),
        _reason_difference,
        uniform_answer=True,
    ),
    "number": QuestionKind(
        "Which number do the digits form?", _number, lambda digits: f"they form {_number(digits)}", uniform_answer=False
    ),
}


def describe(digits: Sequence[int]) -> str:
    """The gold description of a picture."""
    return f"The digits are {' '.join(map(str, digits))} ."


def make_prompts(split: Split, num: int, seed: int) -> list[Prompt]:
    """`num` prompts with pictures of the split's scans; the kinds take turns.

    `metadata["facts"]` holds the digits, left to right, as strings. The same arguments give the same prompts.
    """
    return [_make_prompt(split, index, seed) for index in range(num)]


def make_demonstrations(num: int, seed: int) -> list[SftSample]:
    """`num` worked examples on train scans: by turns a See-Think response to a picture, and a Caption-Reasoner
    response to a description without a picture."""
    return [_make_demonstration(index, seed) for index in range(num)]


def _make_prompt(split: Split, index: int, seed: int) -> Prompt:
    rng = np.random.default_rng([seed, index, split == "heldout"])
    name = list(KINDS)[index % len(KINDS)]
    digits = _draw_digits(KINDS[name], rng)
    return _prompt(f"{split}-{index:06d}", name, digits, (_picture(split, digits, rng),))


def _make_demonstration(index: int, seed: int) -> SftSample:
    see_think = index % 2 == 0
    rng = np.random.default_rng([seed, index, 2])  # 0 and 1 are the prompts' generators
    name = list(KINDS)[index // 2 % len(KINDS)]
    digits = _draw_digits(KINDS[name], rng)
    images = (_picture("train", digits, rng),) if see_think else ()
    prompt = _prompt(f"demonstration-{index:06d}", name, digits, images)
    solution = f"<think> {KINDS[name].reasoning(digits)} </think> \\boxed{{{prompt.answer}}}"
    if see_think:
        return SftSample(prompt, "see_think", f"<description> {describe(digits)} </description> {solution}")
    return SftSample(prompt, "caption_reasoner", solution, describe(digits))


def _prompt(key: str, name: str, digits: Digits, images: tuple[Image, ...]) -> Prompt:
    kind = KINDS[name]
    facts = [str(digit) for digit in digits]
    return Prompt(key, kind.problem, str(kind.answer(digits)), images, source=name, metadata={"facts": facts})


def _draw_digits(kind: QuestionKind, rng: np.random.Generator) -> Digits:
    """Rejection sampling: the first row of uniform digits that has the wanted answer."""
    num_digits = int(rng.choice(list(NUM_DIGITS), p=list(NUM_DIGITS.values())))
    wanted = int(rng.integers(10)) if kind.uniform_answer else None
    while True:
        digits = tuple(int(digit) for digit in rng.integers(10, size=num_digits))
        if wanted is None or kind.answer(digits) == wanted:
            return digits


def _picture(split: Split, digits: Digits, rng: np.random.Generator) -> Image:
    scans = load_scans(split)
    return compose([scans[digit][rng.integers(len(scans[digit]))] for digit in digits])
