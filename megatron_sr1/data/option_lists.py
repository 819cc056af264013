"""Options as data sets write them: a list, one written as text, a mapping, a list of {label, text}; without labels."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sr1.data.json_values import is_number, number_text

MAX_LIST_CHARACTERS = 100_000  # of a list that is written as text
_LABEL = re.compile(r"\(?([A-Za-z]|\d{1,2})(?:[.:)]\s+|\)|、\s*)(?=\S)")


def read_options(value: object) -> tuple[str, ...]:
    """A list, or one that is written as text, in the way of Python or JSON: "['$6', '$7']". () for null and "".

    Also {"A": one, "B": two}, {"label": ["A", "B"], "text": [one, two]}, and [{"label": "A", "text": one}, ...].

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
    if value and all(isinstance(option, Mapping) and set(option) == {"label", "text"} for option in value):
        value = _of_labelled(value)
    all_bool = all(isinstance(option, bool) for option in value)
    for option in value:
        if not isinstance(option, str | int | float) or (isinstance(option, bool) and not all_bool):
            raise ValueError(f"its option {option!r} is a {type(option).__name__}, not text")
    return _unlabelled([number_text(option) if is_number(option) else str(option).strip() for option in value])


def _unlabelled(options: Sequence[str]) -> tuple[str, ...]:
    """The options without labels of their own, `A. cat`. Letters are labels where they run A, B, C ...; `B. Obama` and
    `J. Biden` are names.

    Raises:
        ValueError: they are labels otherwise: in another order, numbers, or not on every option; an answer could mean
            the label or the place.
    """
    labels = [_LABEL.match(option) for option in options]
    found, letters = [label[1].upper() for label in labels if label], string.ascii_uppercase
    if len(options) < 2 or not found:
        return tuple(options)
    if found == list(letters[: len(options)]):
        return tuple(option[label.end() :] for option, label in zip(options, labels, strict=True) if label)
    at_their_place = sum(label is not None and label[1].upper() == letters[n] for n, label in enumerate(labels[:26]))
    if len(found) < len(options):
        if at_their_place > 1 or (labels[0] and found[0] == "A"):  # one alone may be `E. coli`
            bare = next(option for option, label in zip(options, labels, strict=True) if not label)
            raise ValueError(f"its option {bare!r} has no label, and others have: write all with labels, or none")
        return tuple(options)
    are_names = all(map(str.isalpha, found)) and not _run_on(found)
    if not are_names and sorted(found) == sorted(set(found)):
        raise ValueError(
            f"its options have labels of their own, {', '.join(found)}: write them as A, B, C ... in order"
        )
    return tuple(options)


def _run_on(letters: Sequence[str]) -> bool:
    """Whether they are neighbours in the alphabet, in some order: labels that do not begin with A, or are mixed."""
    places = sorted(map(ord, letters))
    return places == list(range(places[0], places[0] + len(places)))


def _of_labelled(options: Sequence[Mapping[str, Any]]) -> list[Any]:
    labels = [str(option["label"]).strip() for option in options]
    if labels != list(string.ascii_uppercase[: len(options)]):
        raise ValueError(f"its options have the labels {', '.join(labels)}: write them as A, B, C ... in order")
    return [option["text"] for option in options]


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
