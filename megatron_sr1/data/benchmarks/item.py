"""What a converter makes of one row, the reasons why it cannot, and typed access to the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sr1.data.sources.source import ProblemKind

SourceRow = Mapping[str, Any]  # column -> value, null where a row has none


@dataclass(frozen=True)
class Item:
    """One question, in the terms of our shards."""

    problem: str  # images are called [image 1], [image 2] ... in it, and stand in front of it
    answer: str
    category: str = ""  # results are reported by it; parts of a finer division are joined by "/"
    key: str = ""  # what the authors call it, unique in the set; "": file and row
    choices: tuple[str, ...] = ()
    images: tuple[object, ...] = ()  # as the columns hold them: bytes, struct or path
    metadata: SourceRow = field(default_factory=dict)


class BadRow(Exception):
    """A row that no question can be made of."""

    def __init__(self, kind: ProblemKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: ProblemKind = kind


def text(row: SourceRow, *names: str) -> str:
    """The first of these columns that is not null, which holds text or a whole number; stripped, maybe "".

    Several names: the same column has been called differently. Raises BadRow.
    """
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise BadRow("field", f"it has no {' or '.join(names)}")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow("field", f"{name}={value!r} must be text")
    return str(value).strip()


def answer_of(row: SourceRow, *names: str) -> str:
    """The gold answer as it is written. Raises BadRow where there is none, or "?", for what the authors withhold."""
    found = "" if all(row.get(name) is None for name in names) else text(row, *names)
    if found in ("", "?"):
        raise BadRow("empty_answer", "its answer is not published; build a split that has answers")
    return found


def some(row: SourceRow, *names: str) -> dict[str, Any]:
    """Those columns that hold something, as metadata."""
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def image_of(row: SourceRow, *names: str) -> object:
    """The first of these columns that holds something. Raises BadRow where none does."""
    image = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if image is None:
        raise BadRow("placeholders", f"it has no image in {' or '.join(names)}")
    return image
