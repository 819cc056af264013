"""Samples that trackers show: the question with its images, what each pass has answered, and what that has earned."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_SIDE = 512  # pixels of an image that is sent
LONGEST_TEXT = 10_000  # characters of a cell
COLUMNS = ("key", "question", "answer", "first", "description", "second", "further", "rewards")


@dataclass(frozen=True)
class SampleRow:
    """One response to one prompt. Texts are as they were written: whoever shows them takes them for text."""

    key: str
    question: str
    answer: str
    first: str
    description: str = ""  # what the later passes were given; "": there is none
    second: str = ""
    further: Mapping[str, str] = field(default_factory=dict)  # of other passes, by name
    rewards: Mapping[str, float] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()  # PNG

    def cells(self) -> dict[str, str]:
        """By the names of COLUMNS."""
        texts = {name: getattr(self, name) for name in ("key", "question", "answer", "first", "description", "second")}
        further = "\n\n".join(f"{name}: {text}" for name, text in self.further.items())
        rewards = ", ".join(f"{name} {value:g}" for name, value in self.rewards.items())
        return {name: _short(text) for name, text in {**texts, "further": further, "rewards": rewards}.items()}

    def opened(self) -> list[Image]:
        """The images, decoded."""
        from PIL import Image as images

        return [images.open(io.BytesIO(data)).convert("RGB") for data in self.images]


class SampleSink(Protocol):
    """Takes samples beside metrics."""

    def show(self, step: int, name: str, rows: Sequence[SampleRow]) -> None: ...


def png_of(image: Image) -> bytes:
    """A copy of at most LONGEST_SIDE pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return buffer.getvalue()


def evaluation_rows(run_dir: Path, tree: Mapping[str, Any], count: int) -> list[SampleRow]:
    """The examples of an evaluation's file. Images that are gone are left out."""
    return [_example(run_dir, example) for example in tree.get("examples", ())[:count]]


def _example(run_dir: Path, example: Mapping[str, Any]) -> SampleRow:
    from PIL import Image as images

    found = []
    for name in example["images"]:
        with suppress(OSError, ValueError), images.open(run_dir / name) as image:
            found.append(png_of(image))
    key, question, answer, first, description, second = (
        str(example[name] or "") for name in ("key", "problem", "answer", "first", "description", "second")
    )
    shown = {"rewards": dict(example["rewards"]), "images": tuple(found)}
    return SampleRow(key, question, answer, first, description, second, **shown)


def as_code(text: str) -> str:
    """Markdown that shows a text as it is: nothing in it is a link, an image or a heading."""
    return "".join(f"    {line}\n" for line in text.splitlines()) or "    \n"


def table_json(rows: Sequence[SampleRow], images: Sequence[Sequence[Any]]) -> str:
    """A table as MLflow draws it: {"columns": [...], "data": [...]}.

    Args:
        images: of each row, cells for columns of their own.
    """
    most = max((len(cells) for cells in images), default=0)
    columns = [*(f"image_{number}" for number in range(most)), *COLUMNS]
    data = [
        [*cells, *[None] * (most - len(cells)), *(row.cells()[name] for name in COLUMNS)]
        for row, cells in zip(rows, images, strict=True)
    ]
    return json.dumps({"columns": columns, "data": data})


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} ... ({len(text)} characters)"
