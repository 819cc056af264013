r"""Lists of answers: sets in any order, tuples and intervals in theirs, matrices, `x = 2, y = 3`, `±5`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sr1.rewards.answers.spelling import matching_bracket

Same = Callable[[str, str], bool]
MAX_ITEMS = 24
_SEPARATOR = re.compile(r"\s?[,;、]\s?(?:(?:and|or)\s)?|\s(?:and|&)\s|\s?[和与及]\s?|(?P<either>\sor\s|或)")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_PAIRS = {"(": ")", "[": "]", "⦃": "⦄", "⟨": "⟩"}
_POINT = re.compile(r"(?:[A-Za-z]'?\s?=?\s?)?(?=[(\[])")
_RELATION = re.compile("[<>≤≥]")
_MATHEMATICAL = re.compile(r"[\d=π∞\\]|^[a-z]$")


@dataclass(frozen=True)
class Items:
    """`brackets` is "" for a bare list, "{}" for a set, "1." where its items are numbered, else the two around it, such
    as "(]"."""

    items: tuple[str, ...]
    brackets: str = ""
    either: bool = False  # joined by `or`

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}")


_NUMBER = re.compile(r"(?:^|(?<=[\s,;]))\(?(\d{1,2})[.)]\s")
_ZEROS = re.compile(r",0\d\d(?!\d)")  # (1,000) is a number in brackets: nobody writes a pair so


def read_items(text: str, split_thousands: bool = False) -> Items | None:
    """The list that a cleaned text is; None where it is a single answer. `split_thousands`: `1,234` is two."""
    if text in ("∅", "⦃⦄"):
        return Items((), "{}")
    if "∥" in text:
        return _matrix(text)
    if numbered := _numbered(text):
        return Items(numbered, "1.")
    inner, brackets = _bracketed(text)
    items, either = split_items(
        inner, split_thousands or bool(brackets and not _spaced_comma(inner) and not _ZEROS.search(inner))
    )
    items = [signed for item in items for signed in _both_signs(item)]
    if len(items) > MAX_ITEMS or (len(items) < 2 and brackets not in ("{}",)):
        return None
    return None if "" in items else Items(tuple(items), brackets, either)


def same_items(answer: Items, gold: Items, same: Same) -> bool:
    """Elementwise where an order is written on a side, else in any order."""
    if len(answer.items) != len(gold.items):
        return False
    mathematical = all(_MATHEMATICAL.search(item) for item in answer.items + gold.items)
    if answer.either != gold.either and any(_RELATION.search(item) for item in answer.items + gold.items):
        return False
    if answer.either != gold.either and (not mathematical or answer.ordered or gold.ordered):
        return False
    if answer.ordered and gold.ordered and answer.brackets != gold.brackets:
        return False
    if {answer.brackets, gold.brackets} >= {"{}"} and (answer.ordered or gold.ordered):
        return False
    if answer.ordered or gold.ordered:
        return all(map(same, answer.items, gold.items))
    left = list(gold.items)
    for item in answer.items:
        match = next((index for index, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def split_items(text: str, split_thousands: bool = False) -> tuple[list[str], bool]:
    """The parts between separators outside of brackets, and whether one of these is `or`."""
    protected = {} if split_thousands else {m.start(): m.end() for m in _THOUSANDS.finditer(text)}
    parts, start, index, either = list[str](), 0, 0, False
    while index < len(text):
        if index in protected:
            index = protected[index]
        elif text[index] in "([{⦃⟨" and (end := matching_bracket(text, index)) > 0:
            index = end + 1
        elif match := _SEPARATOR.match(text, index):
            parts.append(text[start:index].strip())
            either |= match["either"] is not None
            start = index = match.end()
        else:
            index += 1
    return [*parts, text[start:].strip()], either


def _bracketed(text: str) -> tuple[str, str]:
    """(inside, brackets) of a text that is in one pair of brackets; (text, "") otherwise. A point's name falls off."""
    point = _POINT.match(text)
    body = text[point.end() :] if point is not None else text
    if body[:1] not in _PAIRS or not body or matching_bracket(body, 0) != len(body) - 1:
        return text, ""
    brackets = body[0] + body[-1]
    return body[1:-1].strip(), {"⦃⦄": "{}", "⟨⟩": "()"}.get(brackets, brackets)


def _numbered(text: str) -> tuple[str, ...]:
    """The items of `1. red 2. blue`, whose numbers give their order; () where they do not count from 1."""
    markers = list(_NUMBER.finditer(text))
    if len(markers) < 2 or markers[0].start() != 0 or [int(m[1]) for m in markers] != [*range(1, len(markers) + 1)]:
        return ()
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    items = tuple(text[m.end() : end].strip(" ,;") for m, end in zip(markers, ends, strict=True))
    return items if all(items) and len(items) <= MAX_ITEMS else ()


def _spaced_comma(text: str) -> bool:
    return ", " in text


def _matrix(text: str) -> Items | None:
    rows = [row.strip() for row in text.strip("∥ ").split(";")]
    cells = [cell.strip() for row in rows if row for cell in row.split("&")]
    if not cells or text.count("∥") != 2 or len(cells) > MAX_ITEMS:
        return None
    return Items((str(len(rows)), *cells), "∥∥")


def _both_signs(item: str) -> list[str]:
    return [item] if "±" not in item else [item.replace("±", "+", 1), item.replace("±", "-", 1)]
