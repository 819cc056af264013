"""The options of a multiple-choice question: written into its text with letters, and the letter as its answer.

The question is followed by a line `(A) text` for each option and by what to answer with. Sets give the answer as a
letter, as an index from 0, or as the text of the option; where it can be read in two ways nobody guesses.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from decimal import Decimal

ANSWER_WITH_LETTER = "Answer with the letter of the correct option."
_NAME = re.compile(r"([A-Za-z])[.:)]\s*\S")  # J. Biden
_NUMBER = re.compile(r"(?=[+-]?\.?\d)[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,20})?(?:\.\d{1,20})?(?:[eE][+-]?\d{1,3})?")
_LETTER = re.compile(r"(?:\(\s?([A-Za-z])\s?\)|([A-Za-z])[.:)])(?:\s+(.*))?|([A-Za-z])", re.DOTALL)


def ask(question: str, options: Sequence[str], instruct: bool = True) -> str:
    """The question with its options. An option that is only its own letter, drawn in the image, is written once.

    Args:
        instruct: say that the letter is wanted.

    Raises:
        ValueError: there are fewer than two options, or more than letters.
    """
    if not 2 <= len(options) <= len(string.ascii_uppercase):
        raise ValueError(f"it has {len(options)} options; a multiple-choice question has from 2 to 26")
    lines = [
        f"({letter})" if option in ("", letter) else f"({letter}) {option}"
        for letter, option in zip(string.ascii_uppercase, options, strict=False)
    ]
    return "\n".join([question.strip(), *lines, *([ANSWER_WITH_LETTER] * instruct)]).strip()


def is_asked(question: str, options: Sequence[str]) -> bool:
    """Whether the question has its options already, `(A) text`, `A. text` ..., or shows them in an image and asks for
    the letter."""
    if ANSWER_WITH_LETTER in question:
        return True
    return all(
        re.search(rf"(?<!\w){letter}\s?[.:)\]]\s*{re.escape('' if option == letter else option)}", question, re.I)
        for letter, option in zip(string.ascii_uppercase, options, strict=False)
    )


def ask_with_letter(question: str, options: Sequence[str], answer: str, instruct: bool) -> tuple[str, str]:
    """The question with its options, where it does not have them yet, and the letter of the answer.

    What comes out stays as it is when it goes in again.

    Raises:
        ValueError: as `ask`; the answer is none of the options, or could be several.
    """
    twice = next((option for option in options if option and options.count(option) > 1), None)
    if twice is not None:
        raise ValueError(f"two of its options are {twice!r}: its answer can be either")
    _refuse_other_options(question, options)
    if not is_asked(question, options):
        written = [re.search(rf"(?<!\w)[A-Z]\s?[.:)\]]\s*{re.escape(option)}(?!\w)", question) for option in options]
        if all(written) and all(options):
            raise ValueError("its question has the options already, in another order")
        return ask(question, options, instruct), letter_of(answer, options)
    is_letter = answer in list(string.ascii_uppercase[: len(options)])
    return question, answer if is_letter else letter_of(answer, options)


def _refuse_other_options(question: str, options: Sequence[str]) -> None:
    """Raises ValueError where the question lists more options than there are, or some of them otherwise: `D. pink`
    behind A, B and C. The letter of the answer would be one of another list."""
    if ANSWER_WITH_LETTER in question:
        return
    end, style, number = 0, "", 0
    for letter, option in zip(string.ascii_uppercase, options, strict=False):
        text = "" if option == letter else re.escape(option)
        found = re.compile(rf"(?<!\w){letter}\s?([.:)\]])\s*{text}", re.IGNORECASE).search(question, end)
        if found is None or not option:
            break
        end, style, number = found.end(), found[1], number + 1
    if number < 2 or number == len(string.ascii_uppercase):
        return
    letter = string.ascii_uppercase[number]
    if number == len(options):
        begins = rf"(?:\n\s*|\A[\s,;.]*)\(?{letter}\s?{re.escape(style)}\s*\S"  # a line, or what follows at once
        if re.search(begins, question[end:], re.IGNORECASE):
            raise ValueError(f"its question lists an option {letter}, and its choices are only {number}: give all")
    elif not is_asked(question, options):
        raise ValueError(f"its question lists options, but not the option {letter} of its choices, {options[number]!r}")


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of an answer that is a letter, an index from 0, or the text of an option, which may lack its final
    point or write a number otherwise (1000 for `1e3`).

    Raises:
        ValueError: it is none of them, or could be several.
    """
    answer = answer.strip()
    found = set[int]()
    for like in _LIKE:
        found = found or {number for number, option in enumerate(options) if like(option) == like(answer)}
    match = _LETTER.fullmatch(answer)
    if match is not None:
        number = string.ascii_uppercase.index((match[1] or match[2] or match[4]).upper())
        repeated = (match[3] or "").strip().casefold()  # "(b) Paris": the option's text behind its letter
        named = [n for n, o in enumerate(options) if (name := _NAME.match(o)) and name[1].upper() == answer.upper()]
        if named and number < len(options) and named != [number]:
            raise ValueError(
                f"its answer {answer!r} can be the option {string.ascii_uppercase[number]} or the one that begins so, "
                f"{options[named[0]]!r}: give its text"
            )
        if number < len(options) and repeated in ("", options[number].strip().casefold()):
            found.add(number)
    if answer.isascii() and answer.isdigit() and int(answer) < len(options):
        found.add(int(answer))
    letters = [string.ascii_uppercase[number] for number in sorted(found)]
    if not letters:
        raise ValueError(f"its answer {answer!r} is none of its {len(options)} options")
    if len(letters) > 1:
        raise ValueError(
            f"its answer {answer!r} can be the option {' or '.join(letters)}, as a text, a letter or an index from 0: "
            "give it as a letter"
        )
    return letters[0]


def _without_end(text: str) -> str:
    return text.strip().rstrip(" .,;。").casefold()


def _value(text: str) -> str | Decimal:
    """Of a number; any other text is itself."""
    text = text.strip()
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else _without_end(text)


# how an answer may be like an option: the first way in which it is like any decides
_LIKE: tuple[Callable[[str], str | Decimal], ...] = (
    str.strip,
    lambda text: text.strip().casefold(),
    _without_end,
    _value,
)
