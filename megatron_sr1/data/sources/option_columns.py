"""The options of a row: in one column, or in a column each."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping
from typing import Any

from megatron_sr1.data.option_lists import read_options

_LISTS = ("choices", "options", "candidates")
_LOOKS_LIKE = re.compile("option|choice|candidate|possible.?answer|ending|distractor", re.IGNORECASE)
# A, B, C ...; option_a, optionA, choice_1, opt 2 ...
_ONE = re.compile(r"(?P<letter>[A-J])|(?i:option|choice|opt)[ _-]?(?:(?P<named>[A-Ja-j])|(?P<number>\d{1,2}))")


def is_option_name(name: str) -> bool:
    """Whether a column of this name holds options, or one of them."""
    return name in _LISTS or bool(_ONE.fullmatch(name))


def take_options(fields: dict[str, Any], others: dict[str, Any], renamed: Collection[str]) -> tuple[str, ...]:
    """Takes the options out of the columns of a row; an answer that names such a column becomes a letter.

    Args:
        fields: of the schema, `choices` and `answer` among them.
        others: the other columns.
        renamed: columns that the user has spoken of, which are what he says.

    Raises:
        ValueError: two columns hold options; one of a column each is missing; see `read_options`.
    """
    columns = {**others, **({"choices": fields["choices"]} if "choices" in fields else {})}
    lists = [name for name in _LISTS if name in columns and (name == "choices" or name not in renamed)]
    if len(lists) > 1:
        raise ValueError(f"it has options in {' and in '.join(lists)}: leave one out with --rename {lists[1]}=")
    if lists:
        return _none_empty(read_options((fields if lists[0] == "choices" else others).pop(lists[0])))
    found = {name: match for name in others if name not in renamed and (match := _ONE.fullmatch(name))}
    places = {name: _place(match) for name, match in found.items()}
    if len(places) < 2 or not {0, 1} & set(places.values()):
        _refuse_overlooked(others, renamed)
        return ()
    names = sorted(places, key=places.__getitem__)
    counted = any(match["number"] for match in found.values())
    first = places[names[0]] if counted else 0
    if [places[name] for name in names] != list(range(first, first + len(names))):
        raise ValueError(f"its options are the columns {', '.join(names)}, which are not all of them, or not in order")
    answer = str(fields.get("answer", "")).strip()
    if answer in names:
        fields["answer"] = string.ascii_uppercase[names.index(answer)]
    elif first and answer.isdigit():
        raise ValueError(
            f"its options are numbered from 1, {', '.join(names)}, and its answer {answer} could count from 0: give it "
            "as a letter"
        )
    return _none_empty(read_options([others.pop(name) for name in names]))


def _none_empty(options: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError where one is empty beside others; where all are, they are drawn in the image."""
    if any(options) and not all(options):
        raise ValueError(f"its option {string.ascii_uppercase[options.index('') % 26]} is empty")
    return options


def _refuse_overlooked(others: Mapping[str, Any], renamed: Collection[str]) -> None:
    """Raises ValueError for a list under a name like that of options: nobody could answer with a letter of them."""
    for name, value in others.items():
        if name not in renamed and _LOOKS_LIKE.search(name) and isinstance(value, list | Mapping) and len(value) > 1:
            raise ValueError(
                f"the column {name!r} looks like options, which would not be in the question: give it with --rename "
                f"{name}=choices, leave it out with --rename {name}=, or keep it with --rename {name}={name}"
            )


def _place(match: re.Match[str]) -> int:
    letter = match["letter"] or match["named"]
    return string.ascii_uppercase.index(letter.upper()) if letter else int(match["number"])
