"""Where samples come from before they are shards: what a reader yields, and how a row becomes named fields.

A source lists chunks; any process can read any chunk by itself, and the chunks in order are the samples in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megatron_sr1.data.tar_groups import TarGroup

Format = Literal["parquet", "jsonl", "webdataset"]
ProblemKind = Literal[
    "unreadable_sample",  # a line that is not JSON, a tar member that is not of the schema
    "unreadable_image",  # missing, damaged, or of an unknown format
    "image_size",  # a shape the model's processor refuses
    "empty_answer",
    "placeholders",  # the text mentions more images, or fewer, than there are
    "field",  # missing, empty or of the wrong type
    "response",  # not of the layout its template asks for
    "too_long",  # more prompt tokens than allowed
    "duplicate",  # same content as an earlier sample
    "repeated_key",
]
PROBLEM_KINDS: tuple[ProblemKind, ...] = get_args(ProblemKind)
SCHEMA_COLUMNS = (
    "problem",
    "answer",
    "choices",
    "source",
    "metadata",
    "template",
    "response",
    "description",
)
IMAGE_COLUMNS = ("images", "image")
KEY_COLUMN = "key"


@dataclass(frozen=True)
class Problem:
    """Why a sample is left out."""

    where: str  # file and row
    key: str
    kind: ProblemKind
    reason: str


@dataclass(frozen=True)
class RawSample:
    """One sample as it was found: nothing but the names of its fields has been looked at."""

    where: str
    key: str
    fields: Mapping[str, Any]  # names of the schema
    images: tuple[bytes, ...]  # encoded, in order
    marked: bool = True  # <image> in the problem marks where an image stands; False: it is text like any other


@dataclass(frozen=True)
class Chunk:
    """A part of one file that is read at once. `start` counts row groups, record batches, bytes or samples, by the
    format."""

    file: Path
    start: int
    first_row: int
    num_rows: int
    groups: tuple[TarGroup, ...] = ()  # of a tar: the samples and where their members stand


class Source(Protocol):
    """The files of one data set."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    def chunks(self) -> Iterator[Chunk]: ...

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]: ...


class RowReader(Protocol):
    """Makes samples of the rows of a file."""

    def check(self, names: Sequence[str], file: Path) -> None:
        """Raises ValueError where a file with the columns `names` cannot make samples."""
        ...

    def sample(
        self, row: Mapping[str, Any], key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        """`key`: for a row that names none. `load_image`: the bytes of an image; raises ValueError or OSError."""
        ...


@dataclass(frozen=True)
class Columns:
    """How the columns of a row become fields.

    rename: {column: name of the schema}; an empty name leaves the column out. Columns the schema does not know go into
    the sample's metadata.
    """

    rename: Mapping[str, str] = field(default_factory=dict)

    def check(self, names: Sequence[str], file: Path) -> None:
        """Raises ValueError where columns `names` cannot make samples, or --rename names one that is not there."""
        absent = sorted(set(self.rename) - set(names))
        found = {self.rename.get(name, name) for name in names}
        if absent or "problem" not in found or found.isdisjoint({"answer", "response"}):
            raise ValueError(
                f"{file} has the columns {', '.join(names)}; needed are problem, and answer or response"
                + (f", and those of --rename ({', '.join(absent)} is not there)" if absent else "")
                + ". Name them with --rename, for example --rename question=problem solution=answer."
            )

    def sample(
        self, row: Mapping[str, Any], key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        """Numbers become text where the schema wants text; a null is a column that is not there.

        Args:
            load_image: the bytes of one entry of the column `images`; raises ValueError or OSError.
        """
        fields: dict[str, Any] = {}
        others: dict[str, Any] = {}
        images: Sequence[object] = ()
        for column, value in row.items():
            name = self.rename.get(column, column)
            if value is None or not name:
                continue
            if name == KEY_COLUMN and isinstance(value, str | int):
                key = str(value)
            elif name in IMAGE_COLUMNS:
                images = value if isinstance(value, list | tuple) else [value]
            elif name in SCHEMA_COLUMNS:
                fields[name] = str(value) if _is_number(value) else value
            else:
                others[name] = value
        problem = _merge_metadata(fields, others)
        if problem is not None:
            return Problem(where, key, "field", problem)
        loaded = load_images(images, load_image)
        if isinstance(loaded, str):
            return Problem(where, key, "unreadable_image", loaded)
        return RawSample(where, key, fields, loaded)


def load_images(images: Sequence[object], load_image: Callable[[object], bytes]) -> tuple[bytes, ...] | str:
    """Their bytes, or what is wrong with the first one that cannot be had."""
    loaded: list[bytes] = []
    for number, image in enumerate(images):
        try:
            loaded.append(load_image(image))
        except (OSError, ValueError) as error:
            return f"image {number}: {error}"
    return tuple(loaded)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _merge_metadata(fields: dict[str, Any], others: Mapping[str, Any]) -> str | None:
    """Joins columns of other names to the metadata; says what is wrong where that is impossible."""
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, Mapping):
        return f"metadata={metadata!r} must be an object"
    for name, value in others.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            return (
                f"the column {name!r} holds a {type(value).__name__}, which JSON cannot; leave it out with "
                f"--rename {name}="
            )
    if others:
        fields["metadata"] = {**others, **metadata}
    return None
