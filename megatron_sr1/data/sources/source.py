"""Where samples come from before they are shards: what a reader yields, and how a row becomes named fields.

A source lists chunks; any process can read any chunk by itself, and the chunks in order are the samples in order.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megatron_sr1.data.tar_groups import TarGroup

_MAX_REASON = 300  # characters
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
# PNG, JPEG, GIF, WebP, TIFF of either order, BMP
BASE64_HEADS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk0", "Qk1", "Qk2", "Qk3")
Format = Literal["parquet", "jsonl", "json", "webdataset", "llava"]
ProblemKind = Literal[
    "unreadable_sample",  # a line that is not JSON, a tar member that is not of the schema
    "unreadable_image",  # missing, damaged, or of an unknown format
    "image_size",  # a shape the model's processor refuses
    "empty_answer",
    "image_columns",  # an image may stand in a column that is not read, or two columns claim to be the images
    "placeholders",  # the text mentions more images, or fewer, than there are
    "field",  # missing, empty or of the wrong type
    "response",  # not of the layout its template asks for
    "too_long",  # more prompt tokens than allowed
    "duplicate",  # same content as an earlier sample
    "repeated_key",
]
ChangeKind = Literal[
    "key",  # had dots
    "conversation",  # was split into problem and answer
    "options",  # were written into the problem, and the answer became their letter
    "image_marks",  # <image> became [image n]
    "mark_as_text",  # <image> in a problem without images is text
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
    changes: tuple[ChangeKind, ...] = ()  # what is not as it was found, for the report
    lacks_image: str = ""  # where there is none: why a mark in the text must stand for one all the same


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

    @property
    def asked_for(self) -> Collection[str]:
        """Columns that the user has named: each must be in some row."""
        ...

    def check(self, names: Sequence[str], file: Path) -> None:
        """Raises ValueError where a file with the columns `names` cannot make samples."""
        ...

    def sample(
        self, row: Mapping[str, Any], key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        """`key`: for a row that names none. `load_image`: the bytes of an image; raises ValueError or OSError."""
        ...


def load_images(images: Sequence[object], load_image: Callable[[object], bytes]) -> tuple[bytes, ...] | str:
    """Their bytes, or what is wrong with the first one that cannot be had."""
    loaded: list[bytes] = []
    for number, image in enumerate(images):
        try:
            if isinstance(image, str | bytes) and not image:
                raise ValueError("it is empty")
            written_out = base64_image(image)
            loaded.append(load_image(image) if written_out is None else written_out)
        except (OSError, ValueError) as error:
            text = str(error)
            return f"image {number}: {text[:_MAX_REASON]}{' ...' * (len(text) > _MAX_REASON)}"
    return tuple(loaded)


def base64_image(image: object) -> bytes | None:
    """The bytes of an image that is written out as text, alone or as a data URL; None where it is something else.

    Raises:
        ValueError: it begins as an image in base64 and is none.
    """
    text = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(text, str):
        return None
    found = _DATA_URL.match(text)
    text = text[found.end() :] if found else text
    if not found and not text.startswith(BASE64_HEADS):
        return None
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"it begins as an image in base64, {text[:20]!r}, and is none: {error}") from error
