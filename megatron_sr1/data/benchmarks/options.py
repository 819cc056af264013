"""Options of multiple-choice questions: four ways in which sets write them, one in which we ask (see `data.choices`).

The gold answer is the capital letter; the texts are kept as the sample's choices, so the grader takes an option's text
for its letter.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from megatron_sr1.data import choices
from megatron_sr1.data.benchmarks.item import BadRow
from megatron_sr1.data.choices import ANSWER_WITH_LETTER
from megatron_sr1.data.option_lists import read_options

__all__ = [
    "ANSWER_WITH_LETTER",
    "ask",
    "gold_letter",
    "parse_options",
    "split_lettered_lines",
    "split_parenthesised",
]

_LETTERED_LINE = re.compile(r"\s*\(?([A-Z])\s?[.:)]\s*(.*)")
_GOLD = re.compile(r"(?:\(\s?([A-Za-z])\s?\)|([A-Za-z])[.:)])(?:\s.*)?|([A-Za-z])", re.DOTALL)


def parse_options(value: object) -> tuple[str, ...]:
    """As `read_options`; raises BadRow."""
    try:
        return read_options(value)
    except ValueError as error:
        raise BadRow("field", str(error)) from error


def split_lettered_lines(question: str) -> tuple[str, tuple[str, ...]]:
    """The question and the options of a text that ends with the lines `A. one`, `B. two` ... (also `A:`, `(A)`).

    (the whole text, ()) where it does not end so.
    """
    lines = question.rstrip().split("\n")
    options: list[str] = []
    for number in range(len(lines) - 1, -1, -1):
        match = _LETTERED_LINE.fullmatch(lines[number])
        if match is None:
            break
        options.insert(0, match[2].strip())
        if match[1] == "A":
            found = [_LETTERED_LINE.fullmatch(line) for line in lines[number:]]
            letters = "".join(line[1] for line in found if line is not None)
            if len(options) > 1 and letters == string.ascii_uppercase[: len(options)]:
                return "\n".join(lines[:number]).rstrip(), tuple(options)
            break
    return question, ()


def split_parenthesised(written: str) -> tuple[str, ...]:
    """The options in one line of text: "(a) 0.92 (b) 0.61 (c) 0.5".

    Raises:
        BadRow: it does not begin with (a), or there is no (b).
    """
    rest, options = written.strip(), list[str]()
    for letter, following in zip(string.ascii_lowercase, string.ascii_lowercase[1:] + "-", strict=True):
        if not rest.lower().startswith(f"({letter})"):
            break
        end = rest.lower().find(f"({following})", 3)
        options.append(rest[3 : end if end >= 0 else None].strip())
        rest = rest[end:] if end >= 0 else ""
    if len(options) < 2:
        raise BadRow("field", f"its options must be written (a) one (b) two ..., not {written[:80]!r}")
    return tuple(options)


def gold_letter(answer: str, num_options: int) -> str:
    """`b`, `(B)`, `B.` and `(b) Paris` are `B`.

    Raises:
        BadRow: no letter, or one that is none of the options.
    """
    match = _GOLD.fullmatch(answer.strip())
    letter = "" if match is None else (match[1] or match[2] or match[3]).upper()
    if not letter or letter not in string.ascii_uppercase[:num_options]:
        raise BadRow("field", f"its answer {answer!r} is none of its {num_options} options")
    return letter


def ask(question: str, options: Sequence[str]) -> str:
    """As `choices.ask`; raises BadRow."""
    try:
        return choices.ask(question, options)
    except ValueError as error:
        raise BadRow("field", str(error)) from error
