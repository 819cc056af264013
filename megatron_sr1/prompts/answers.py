r"""Where a response says its answer: in a box, in a block of its own, in a JSON object, on the last line.

    boxed       \boxed{10}                 behind it one final period may stand
    tag         <answer> 10 </answer>
    json        {"answer": "10"}           the value under a key: a text, a number, true or false
    last_line   10

Strictly, an answer is all that comes behind the last block; leniently, the last one that the text has. Every function
takes time linear in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

AnswerKind = Literal["boxed", "tag", "json", "last_line"]
Span = tuple[int, int]
_BOX = "\\boxed{"
# A backslash takes the next character with it, so that \{ and \} are not braces.
_BRACE = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
_OBJECTS_TRIED = 32  # opening braces, from the end: each try is linear, so all of them are
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's


class Found(NamedTuple):
    """An answer. `text[slice(*span)]` is how it is written, `block` has the braces or tags around it, too."""

    answer: str
    span: Span
    block: Span


@dataclass(frozen=True)
class AnswerFormat:
    """How a response gives its answer."""

    kind: AnswerKind = "boxed"
    name: str = ""  # of the tag, or the key of the JSON object

    def strict(self, text: str, start: int) -> Found | None:
        """The answer that is everything from `start` on, blanks aside; None where it is blank or something else."""
        return _STRICT[self.kind](text, start, self.name)

    def write(self, answer: str) -> str:
        """A text that gives the answer, as whoever keeps to the format writes it."""
        return _WRITTEN[self.kind](answer, self.name)

    def last(self, text: str, start: int | None) -> Found | None:
        """The last answer in the text, or None.

        Args:
            start: where the last block of the layout ends; a last line counts only behind it. None: it has no end, as
                where the response was cut.
        """
        if self.kind == "last_line":
            return None if start is None else _last_line(text, start)
        return _LAST[self.kind](text, self.name)


BOXED = AnswerFormat()


def extract_boxed(text: str) -> str | None:
    r"""The stripped inside of the last `\boxed{}` whose braces balance, or None. Of nested boxes, the innermost."""
    found = _last_box(text, "")
    return None if found is None else found.answer


def skip_space(text: str, start: int) -> int:
    """Where the next character that is no blank stands, from `start` on."""
    return len(text) - len(text[start:].lstrip())


def stripped(text: str, span: Span) -> Span:
    """The same without the blanks at both ends."""
    inner = text[slice(*span)]
    start = span[0] + len(inner) - len(inner.lstrip())
    return start, start + len(inner.strip())


def is_blank(text: str, span: Span) -> bool:
    """Whether nothing but blanks is there."""
    return not text[slice(*span)].strip()


# ---------------------------------------------------------------- boxes
def _strict_box(text: str, start: int, name: str) -> Found | None:
    box = skip_space(text, start)
    if not text.startswith(_BOX, box):
        return None
    end = _closing_brace(text, box + len(_BOX))
    inner = (box + len(_BOX), -1 if end is None else end)
    if end is None or is_blank(text, inner) or _BOX in text[slice(*inner)]:
        return None
    return _found(text, inner, (box, end + 1)) if text[end + 1 :].strip() in ("", ".") else None


def _last_box(text: str, name: str) -> Found | None:
    last: Span | None = None
    open_braces: list[tuple[bool, int]] = []  # (opened by \boxed, where it begins)
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.end())
        elif token in ("{", _BOX):
            open_braces.append((token == _BOX, match.start()))
    return None if last is None else _found(text, (last[0] + len(_BOX), last[1] - 1), last)


def _closing_brace(text: str, start: int) -> int | None:
    """Where the group whose inside begins at `start` is closed."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
        elif match.group() in ("{", _BOX):
            depth += 1
    return None


# ---------------------------------------------------------------- tags
def _strict_tag(text: str, start: int, name: str) -> Found | None:
    """That its tags stand once is the layout's to see."""
    opening, closing = f"<{name}>", f"</{name}>"
    block = skip_space(text, start)
    end = text.find(closing, block + len(opening))
    inner = (block + len(opening), end)
    if not text.startswith(opening, block) or end < 0 or is_blank(text, inner):
        return None
    return None if text[end + len(closing) :].strip() else _found(text, inner, (block, end + len(closing)))


def _last_tag(text: str, name: str) -> Found | None:
    opening, closing = f"<{name}>", f"</{name}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, max(end, 0))
    if start < 0:
        return None
    return _found(text, (start + len(opening), end), (start, end + len(closing)))


# ---------------------------------------------------------------- JSON
def _strict_object(text: str, start: int, name: str) -> Found | None:
    found = _object_at(text, skip_space(text, start), name)  # blanks that JSON has not are none of the object's
    return None if found is None or not found.answer or text[found.block[1] :].strip() else found


def _last_object(text: str, name: str) -> Found | None:
    """Of the objects that have the key."""
    brace = len(text)
    for _ in range(_OBJECTS_TRIED):
        brace = text.rfind("{", 0, brace)
        if brace < 0:
            return None
        found = _object_at(text, brace, name)
        if found is not None:
            return found
    return None


def _object_at(text: str, start: int, name: str) -> Found | None:
    """The value under the key of the object that begins at `start`; None where there is no object, or it has the key
    not once, or a value that is no answer."""
    try:
        members, end = _members(text, start)
    except (ValueError, RecursionError):  # no JSON; nested too deeply; a number of 5,000 digits
        return None
    values = [(value, span) for key, value, span in members if key == name]
    if len(values) != 1 or not isinstance(values[0][0], str | int | float):
        return None
    value, span = values[0]
    if not isinstance(value, str):
        return Found(text[slice(*span)], span, (start, end))
    return Found(value.strip(), stripped(text, (span[0] + 1, span[1] - 1)), (start, end))


def _members(text: str, start: int) -> tuple[list[tuple[Any, Any, Span]], int]:
    """(key, value, where the value stands) of the object that begins at `start`, and where it ends. Raises ValueError
    where there is none, or an empty one."""
    members: list[tuple[Any, Any, Span]] = []
    place = _expect(text, start, "{")
    while True:
        key, place = _DECODER.raw_decode(text, place)
        first = _expect(text, place, ":")
        value, place = _DECODER.raw_decode(text, first)
        members.append((key, value, (first, place)))
        if text.startswith("}", _after_space(text, place)):
            return members, _after_space(text, place) + 1
        place = _expect(text, place, ",")


def _expect(text: str, start: int, mark: str) -> int:
    """Behind the mark and its blanks."""
    place = _after_space(text, start)
    if not text.startswith(mark, place):
        raise ValueError(f"no {mark!r} at {place}")
    return _after_space(text, place + 1)


def _after_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    assert match is not None, "it matches nothing, too"
    return match.end()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


# ---------------------------------------------------------------- lines
def _strict_line(text: str, start: int, name: str) -> Found | None:
    """Behind blocks exactly one line; without blocks the last of all lines."""
    found = _last_line(text, start)
    return None if found is None or (start and found.span[0] != skip_space(text, start)) else found


def _last_line(text: str, start: int) -> Found | None:
    end = len(text.rstrip())
    if end <= start:
        return None
    span = stripped(text, (max(start, text.rfind("\n", 0, end) + 1), end))
    return Found(text[slice(*span)], span, span)


def _found(text: str, inner: Span, block: Span) -> Found:
    span = stripped(text, inner)
    return Found(text[slice(*span)], span, block)


_STRICT: dict[AnswerKind, Callable[[str, int, str], Found | None]] = {
    "boxed": _strict_box,
    "tag": _strict_tag,
    "json": _strict_object,
    "last_line": _strict_line,
}
_WRITTEN: dict[AnswerKind, Callable[[str, str], str]] = {
    "boxed": lambda answer, name: f"{_BOX}{answer}}}",
    "tag": lambda answer, name: f"<{name}>{answer}</{name}>",
    "json": lambda answer, name: json.dumps({name: answer}, ensure_ascii=False),
    "last_line": lambda answer, name: answer,
}
_LAST: dict[AnswerKind, Callable[[str, str], Found | None]] = {
    "boxed": _last_box,
    "tag": _last_tag,
    "json": _last_object,
}
