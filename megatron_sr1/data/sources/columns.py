"""How the columns of a row become the fields of a sample. What has no place is named: nothing falls away in silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sr1.data.image_marks import IMAGE_MARK
from megatron_sr1.data.json_values import as_json, is_missing, is_number, number_text
from megatron_sr1.data.sources.answer_values import single_answer, worded_answer
from megatron_sr1.data.sources.image_columns import overlooked_images
from megatron_sr1.data.sources.option_columns import take_options
from megatron_sr1.data.sources.source import (
    IMAGE_COLUMNS,
    KEY_COLUMN,
    SCHEMA_COLUMNS,
    ChangeKind,
    Problem,
    ProblemKind,
    RawSample,
    load_images,
)
from megatron_sr1.data.sources.turns import TURN_COLUMNS, split_turns

_SYSTEM = ("system", "system_prompt")


class _Unclear(Exception):
    """A row that no sample can be made of."""

    def __init__(self, kind: ProblemKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: ProblemKind = kind


@dataclass
class _Row:
    """A row whose columns are being sorted."""

    fields: dict[str, Any] = field(default_factory=dict)  # of the schema
    images: dict[str, list[object]] = field(default_factory=dict)  # by the name of their column
    others: dict[str, Any] = field(default_factory=dict)
    changes: list[ChangeKind] = field(default_factory=list)
    no_images: str = ""  # a column of images that is empty

    def set(self, name: str, value: object, column: str) -> None:
        if name in self.fields:
            raise _Unclear("field", f"{name} is given twice, the second time by {column!r}: leave one out")
        self.fields[name] = value


@dataclass(frozen=True)
class Columns:
    """How the columns of a row become fields.

    rename: {column: name of the schema}; an empty name leaves the column out. Columns the schema does not know go into
    the sample's metadata. Several columns that are renamed to `images` are joined, in the order of `rename`.
    """

    rename: Mapping[str, str] = field(default_factory=dict)

    @property
    def asked_for(self) -> Collection[str]:
        """See `RowReader`."""
        return self.rename.keys()

    def check(self, names: Sequence[str], file: Path) -> None:
        """Raises ValueError where columns `names` cannot make samples, or --rename names one that is not there."""
        absent = sorted(set(self.rename) - set(names))
        found = {self.rename.get(name, name) for name in names}
        has_turns = not found.isdisjoint(TURN_COLUMNS)
        lacks = not has_turns and ("problem" not in found or found.isdisjoint({"answer", "response"}))
        if absent or lacks:
            raise ValueError(
                f"{file} has the columns {', '.join(names)}; needed are problem, and answer or response"
                + (f", and those of --rename ({', '.join(absent)} is not there)" if absent else "")
                + ". Name them with --rename, for example --rename question=problem solution=answer."
            )

    def sample(
        self, row: Mapping[str, Any], key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        """Numbers become text where the schema wants text; a null, or NaN, is a column that is not there.

        Args:
            load_image: the bytes of one entry of the column `images`; raises ValueError or OSError.
        """
        try:
            sorted_row, key = self._sort(row, key)
            images = _images(sorted_row, self.rename)
            _fill(sorted_row, self.rename, row)
        except _Unclear as unclear:
            return Problem(where, key, unclear.kind, str(unclear))
        loaded = load_images(images, load_image)
        if isinstance(loaded, str):
            return Problem(where, key, "unreadable_image", loaded)
        changes, lacks = tuple(sorted_row.changes), _lacks_image(sorted_row)
        return RawSample(where, key, sorted_row.fields, loaded, changes=changes, lacks_image=lacks)

    def _sort(self, row: Mapping[str, Any], key: str) -> tuple[_Row, str]:
        """The row's columns by what they are, and its key."""
        found, order = _Row(), {column: number for number, column in enumerate(self.rename)}
        for column in sorted(row, key=lambda column: order.get(column, -1)):
            name, value = self.rename.get(column, column), row[column]
            if name in IMAGE_COLUMNS and _is_no_image(value):
                found.no_images = column
                continue
            if is_missing(value) or not name:
                continue
            if name == KEY_COLUMN and isinstance(value, str | int):
                key = str(value)
            elif name in IMAGE_COLUMNS:
                found.images.setdefault(name, []).extend(value if isinstance(value, list | tuple) else [value])
            elif name in SCHEMA_COLUMNS:
                found.set(name, value, column)
            elif name in found.others:
                raise _Unclear("field", f"two columns are called {name!r}, the second is {column!r}: leave one out")
            else:
                found.others[name] = value
        return found, key


def _is_no_image(value: object) -> bool:
    """Null, an empty list, or what a table writes for them: {bytes: null, path: null}. Empty bytes, or an empty path,
    are an image that was lost."""
    if isinstance(value, Mapping):
        return all(inner is None for inner in value.values())
    return is_missing(value) or (isinstance(value, list | tuple) and not value)


def _images(row: _Row, rename: Mapping[str, str]) -> Sequence[object]:
    """The images of a row that says clearly which they are."""
    given = [name for name, images in row.images.items() if images]
    if len(given) > 1:
        reason = "it has images and image: join them with --rename image=images, or leave one out with --rename image="
        raise _Unclear("image_columns", reason)
    others = {name: value for name, value in row.others.items() if name not in TURN_COLUMNS}
    overlooked = overlooked_images(others, bool(given), rename)
    if overlooked:
        raise _Unclear("image_columns", overlooked)
    return row.images[given[0]] if given else ()


def _lacks_image(row: _Row) -> str:
    """As `RawSample.lacks_image`."""
    if "conversation" in row.changes:
        return "it is a conversation, where that is an image, but has none"
    if row.no_images and str(row.fields["problem"]).lstrip().startswith(IMAGE_MARK):
        return f"its column {row.no_images!r} is empty"
    return ""


def _fill(row: _Row, rename: Mapping[str, str], columns: Mapping[str, Any]) -> None:
    """Makes of conversations, options, numbers and other columns what the schema has."""
    fields, others = row.fields, row.others
    try:
        turns = [name for name in TURN_COLUMNS if name in others]
        if system := [name for name in _SYSTEM if turns and others.get(name) and name not in rename]:
            raise ValueError(
                f"its {system[0]!r} is said before the conversation, and would be lost: put it into the question, or "
                f"leave it out with --rename {system[0]}="
            )
        for column in turns:
            for name, text in split_turns(column, others.pop(column)).items():
                row.set(name, text, column)
            row.changes.append("conversation")
        if "answer" in fields:
            fields["answer"] = single_answer(fields["answer"])
        choices = take_options(fields, others, rename)
        if "answer" in fields:
            fields["answer"] = worded_answer(fields["answer"], choices)
    except ValueError as error:
        raise _Unclear("field", str(error)) from error
    if choices:
        fields["choices"] = list(choices)
    named = f"its columns are {', '.join(columns)}; name it with --rename COLUMN="
    if "problem" not in fields:
        raise _Unclear("field", f"it has no problem; {named}problem")
    if fields.keys().isdisjoint({"answer", "response"}):
        raise _Unclear("empty_answer", f"it has no answer; {named}answer")
    _merge_metadata(row)
    for name, value in fields.items():
        fields[name] = number_text(value) if is_number(value) else _json_of(name, value)


def _merge_metadata(row: _Row) -> None:
    """Joins columns of other names to the metadata."""
    metadata = row.fields.get("metadata", {})
    if not isinstance(metadata, Mapping):
        raise _Unclear("field", f"metadata={metadata!r} must be an object")
    merged: dict[str, Any] = {}
    for name, value in [*row.others.items(), *metadata.items()]:
        kept = _json_of(name, value)
        if name in merged and merged[name] != kept:
            raise _Unclear("field", f"{name!r} is a column and stands in metadata too, otherwise: leave one out")
        merged[name] = kept
    if merged:
        row.fields["metadata"] = merged


def _json_of(column: str, value: object) -> Any:
    try:
        return as_json(value)
    except TypeError as error:
        reason = f"the column {column!r} holds {error}; leave it out with --rename {column}="
        raise _Unclear("field", reason) from error
