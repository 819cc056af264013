"""The options of a multiple-choice question: written into its text with letters, and the letter as its answer.

The question is followed by a line `(A) text` for each option and by what to answer with. Sets give the answer as a
letter, as an index from 0, or as the text of the option; where it can be read in two ways nobody guesses.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Mapping, Sequence

from megatron_sr1.data.json_values import is_number, number_text

ANSWER_WITH_LETTER = "Answer with the letter of the correct option."
MAX_LIST_CHARACTERS = 100_000  # of a list that is written as text
_LABEL = re.compile(r"\(?([A-Za-z]|\d{1,2})(?:[.:)]\s+|\)|、\s*)(?=\S)")
_LETTER = re.compile(r"(?:\(\s?([A-Za-z])\s?\)|([A-Za-z])[.:)])(?:\s+(.*))?|([A-Za-z])", re.DOTALL)


def read_options(value: object) -> tuple[str, ...]:
    """A list, or one that is written as text, in the way of Python or JSON: "['$6', '$7']". () for null and "".

    Also {"A": one, "B": two}, and {"label": ["A", "B"], "text": [one, two]}.

    Raises:
        ValueError: it is something else, or an option is neither text nor a number.
    """
    if isinstance(value, str):
        value = _read_list(value)
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = _of_mapping(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"its options {value!r} are no list")
    for option in value:
        if isinstance(option, bool) or not isinstance(option, str | int | float):
            raise ValueError(f"its option {option!r} is a {type(option).__name__}, not text")
    return _unlabelled([number_text(option) if is_number(option) else str(option).strip() for option in value])


def _unlabelled(options: Sequence[str]) -> tuple[str, ...]:
    """The options without labels of their own, `A. cat`. Raises ValueError where these are no A, B, C ..., in order: an
    answer could mean the label or the place."""
    labels = [_LABEL.match(option) for option in options]
    if len(options) < 2 or not all(labels):
        return tuple(options)
    found = [label[1].upper() for label in labels if label]
    if found == list(string.ascii_uppercase[: len(options)]):
        return tuple(option[label.end() :] for option, label in zip(options, labels, strict=True) if label)
    if sorted(found) == sorted(set(found)):
        raise ValueError(
            f"its options have labels of their own, {', '.join(found)}: write them as A, B, C ... in order"
        )
    return tuple(options)


def _read_list(written: str) -> object:
    if not written.strip():
        return None
    if len(written) > MAX_LIST_CHARACTERS:
        raise ValueError(f"its options have {len(written)} characters; {MAX_LIST_CHARACTERS} are allowed")
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(written.strip())  # literals only: nothing is run
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"its options are no list: {written[:80]!r}") from error


def _of_mapping(value: Mapping[object, object]) -> object:
    labels, texts = (
        (value["label"], value["text"]) if set(value) == {"label", "text"} else (list(value), [*value.values()])
    )
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        return value
    return texts if labels == list(string.ascii_uppercase[: len(labels)]) else value


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
    if not is_asked(question, options):
        written = [re.search(rf"(?<!\w)[A-Z]\s?[.:)\]]\s*{re.escape(option)}(?!\w)", question) for option in options]
        if all(written) and all(options):
            raise ValueError("its question has the options already, in another order")
        return ask(question, options, instruct), letter_of(answer, options)
    is_letter = answer in list(string.ascii_uppercase[: len(options)])
    return question, answer if is_letter else letter_of(answer, options)


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of an answer that is a letter, an index from 0, or the text of an option.

    Raises:
        ValueError: it is none of them, or could be several.
    """
    answer = answer.strip()
    same = [number for number, option in enumerate(options) if option.strip() == answer]
    found = set(same or [n for n, option in enumerate(options) if option.strip().casefold() == answer.casefold()])
    match = _LETTER.fullmatch(answer)
    if match is not None:
        number = string.ascii_uppercase.index((match[1] or match[2] or match[4]).upper())
        repeated = (match[3] or "").strip().casefold()  # "(b) Paris": the option's text behind its letter
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
