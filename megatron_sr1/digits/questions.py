"""Questions about a row of digits, their answers, and worked demonstrations of both passes.

The text of a question says nothing about the picture: the answer must be read off the digits. Differences are drawn
uniformly from 0-9, so that no constant answer is right more often than one time in ten; sums keep the distribution of
the sum of two or three digits. Every kind of KINDS needs every digit: an answer that is right by luck while a digit was
misread would reward an unfaithful description.

With several questions about each picture (`make_prompts(..., questions=3)`) PARTIAL_KINDS are among them, which can be
answered from a part of the picture: then a description may suffice for its own question and for no other. Digits are
uniform there, for one picture cannot have the answer that each of its questions would draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
PARTIAL_KINDS: Mapping[str, QuestionKind] = {
    "largest": QuestionKind(
        "What is the largest digit?",
        max,
        lambda digits: f"the largest of {' '.join(map(str, digits))} is {max(digits)}",
        uniform_answer=False,
    ),
    "leftmost": QuestionKind(
        "Which digit is the leftmost?",
        lambda digits: digits[0],
        lambda digits: f"they begin with {digits[0]}",
        uniform_answer=False,
    ),
}
ALL_KINDS: Mapping[str, QuestionKind] = {**KINDS, **PARTIAL_KINDS}


def describe(digits: Sequence[int]) -> str:
    """The gold description of a picture."""
    return f"The digits are {' '.join(map(str, digits))} ."


def make_prompts(split: Split, num: int, seed: int, questions: int = 1) -> list[Prompt]:
    """`num` prompts with pictures of the split's scans; the kinds take turns.

    The metadata hold `facts`, the digits from left to right as strings, and `description`, the gold one. With several
    questions a picture they hold `questions` as well: all others of ALL_KINDS, `{problem, answer}` each. The same
    arguments give the same prompts.

    Args:
        questions: about each picture, in successive prompts; 1 ... 5.

    Raises:
        ValueError: there are not so many kinds.
    """
    if not 1 <= questions <= len(ALL_KINDS):
        raise ValueError(f"questions={questions} is not allowed: it must be 1 ... {len(ALL_KINDS)}, a kind each.")
    return [_make_prompt(split, index, seed, questions) for index in range(num)]


def make_demonstrations(num: int, seed: int, questions: int = 1) -> list[SftSample]:
    """`num` worked examples on train scans: by turns a See-Think response to a picture, and a Caption-Reasoner
    response to a description without a picture; of the kinds of `make_prompts` with as many questions."""
    return [_make_demonstration(index, seed, questions) for index in range(num)]


def _kinds(questions: int) -> list[str]:
    return list(KINDS if questions == 1 else ALL_KINDS)


def _make_prompt(split: Split, index: int, seed: int, questions: int) -> Prompt:
    kinds = _kinds(questions)
    name = kinds[index % len(kinds)]
    rng = np.random.default_rng([seed, index // questions, split == "heldout"])
    digits = _draw_digits(KINDS[name] if questions == 1 else None, rng)
    prompt = _prompt(f"{split}-{index:06d}", name, digits, (_picture(split, digits, rng),))
    if questions == 1:
        return prompt
    others = [ALL_KINDS[kinds[(index + step) % len(kinds)]] for step in range(1, len(kinds))]
    asked = [{"problem": kind.problem, "answer": str(kind.answer(digits))} for kind in others]
    return replace(prompt, metadata={**prompt.metadata, "questions": asked})


def _make_demonstration(index: int, seed: int, questions: int) -> SftSample:
    see_think, kinds = index % 2 == 0, _kinds(questions)
    rng = np.random.default_rng([seed, index, 2])  # 0 and 1 are the prompts' generators
    name = kinds[index // 2 % len(kinds)]
    digits = _draw_digits(ALL_KINDS[name] if questions == 1 else None, rng)
    images = (_picture("train", digits, rng),) if see_think else ()
    prompt = _prompt(f"demonstration-{index:06d}", name, digits, images)
    solution = f"<think> {ALL_KINDS[name].reasoning(digits)} </think> \\boxed{{{prompt.answer}}}"
    if see_think:
        return SftSample(prompt, "see_think", f"<description> {describe(digits)} </description> {solution}")
    return SftSample(prompt, "caption_reasoner", solution, describe(digits))


def _prompt(key: str, name: str, digits: Digits, images: tuple[Image, ...]) -> Prompt:
    kind = ALL_KINDS[name]
    known = {"facts": [str(digit) for digit in digits], "description": describe(digits)}
    return Prompt(key, kind.problem, str(kind.answer(digits)), images, source=name, metadata=known)


def _draw_digits(kind: QuestionKind | None, rng: np.random.Generator) -> Digits:
    """Rejection sampling: the first row of uniform digits that has the wanted answer; None: any."""
    num_digits = int(rng.choice(list(NUM_DIGITS), p=list(NUM_DIGITS.values())))
    wanted = int(rng.integers(10)) if kind is not None and kind.uniform_answer else None
    while True:
        digits = tuple(int(digit) for digit in rng.integers(10, size=num_digits))
        if kind is None or wanted is None or kind.answer(digits) == wanted:
            return digits


def _picture(split: Split, digits: Digits, rng: np.random.Generator) -> Image:
    scans = load_scans(split)
    return compose([scans[digit][rng.integers(len(scans[digit]))] for digit in digits])
