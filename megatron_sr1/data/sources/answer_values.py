"""Answers that are no text: a list of one, true and false."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LIST_OF_ONE = re.compile(r"\[\s*(?:'([^'\n]*)'|\"([^\"\n]*)\")\s*\]")
_WORDS = {True: ("true", "yes"), False: ("false", "no")}


def single_answer(value: object) -> object:
    """What is in a list of one, also in one that is written as text, `['red']`; anything else as it is.

    Raises:
        ValueError: a list of several.
    """
    if isinstance(value, str) and (match := _LIST_OF_ONE.fullmatch(value.strip())):
        return match[1] if match[1] is not None else match[2]
    if not isinstance(value, list | tuple):
        return value
    if len(value) > 1:
        raise ValueError(f"its answer is a list of {len(value)}, {str(value)[:80]}: give one answer, as text")
    return value[0] if value else ""


def worded_answer(value: object, choices: Sequence[str]) -> object:
    """The option that a truth value means; anything else as it is.

    Raises:
        ValueError: a truth value of a question without such options: whether it wants `Yes` or `True` nobody knows.
    """
    if not isinstance(value, bool):
        return value
    meant = [choice for choice in choices if choice.casefold() in _WORDS[value]]
    if len(meant) != 1:
        yes, no = ("Yes or True", "No or False")
        raise ValueError(
            f"its answer is the truth value {value}: write the word that the question asks for, {yes if value else no}"
        )
    return meant[0]
