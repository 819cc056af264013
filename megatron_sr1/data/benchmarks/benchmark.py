"""One public set: how its rows become samples. A source reads the files, and asks it as it asks `Columns`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.data.benchmarks.item import BadRow, Item, SourceRow
from megatron_sr1.data.image_marks import IMAGE_MARK
from megatron_sr1.data.sources.source import Problem, RawSample, load_images

_NOT_IN_KEYS = re.compile(r"[^\w/-]+")


@dataclass(frozen=True)
class Benchmark:
    """A set that `tools/build_benchmark.py` converts."""

    name: str  # the first part of `source`; the category is what follows
    dataset: str  # who publishes it, for messages
    columns: tuple[tuple[str, ...], ...]  # every one is needed; several names: one of them
    convert: Callable[[SourceRow], Item]  # a function of a module: worker processes import it
    split: str | None = None  # that is evaluated; file names begin with it, or are it. None: all files
    folder: str = ""  # of the set, where one repository holds several
    labels: str = ""  # the file with the answers, where questions in JSON come without them, see `labels.py`

    @property
    def asked_for(self) -> Collection[str]:
        """None: see `RowReader`."""
        return ()

    def check(self, names: Sequence[str], file: Path) -> None:
        """Raises ValueError where a file with the columns `names` is of another set."""
        missing = [" or ".join(one_of) for one_of in self.columns if not set(one_of) & set(names)]
        if missing:
            raise ValueError(
                f"{file} has the columns {', '.join(names)}; {self.name} needs {', '.join(missing)} too. Is it a file "
                f"of {self.dataset}?"
            )

    def sample(
        self, row: SourceRow, key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        """As `Columns.sample`; the source of a sample is `<name>/<category>`."""
        try:
            item = self.convert(row)
        except BadRow as bad:
            return Problem(where, key, bad.kind, str(bad))
        key = f"{self.name}/{_NOT_IN_KEYS.sub('_', item.key or key).strip('/')}"
        images = load_images(item.images, load_image)
        if isinstance(images, str):
            return Problem(where, key, "unreadable_image", images)
        fields: dict[str, Any] = {
            "problem": _unmarked(item.problem, len(images)),
            "answer": item.answer,
            "source": f"{self.name}/{item.category}" if item.category else self.name,
        }
        if item.choices:
            fields["choices"] = [_unmarked(choice, len(images)) for choice in item.choices]
        if item.metadata:
            fields["metadata"] = dict(item.metadata)
        return RawSample(where, key, fields, images, marked=False)


def _unmarked(text: str, num_images: int) -> str:
    """What spells `<image>` beside images would be taken for a mark (see `image_marks`)."""
    return text.replace(IMAGE_MARK, "[image]") if num_images else text
