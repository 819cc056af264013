"""Conversations as LLaVA and ShareGPT write them: one sample for each answer.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhich?"},
                                                    {"from": "gpt", "value": "A"}, ...]}

The n-th sample asks the n-th question. What was said before it stands in front of it, `User: ...` and `Assistant: ...`,
so that "And the other one?" is asked with what it refers to; the sample has the images of the turns up to its own. A
system turn at the beginning stands in front of everything. Nothing is left away: a row that says something else is left
out whole, by its file, its number and its id.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_sr1.config.data_suffixes import JSON_SUFFIX, JSONL_SUFFIXES
from megatron_sr1.data.image_marks import IMAGE_MARK
from megatron_sr1.data.sources.files import find_files
from megatron_sr1.data.sources.json_files import JsonSource
from megatron_sr1.data.sources.json_lines import JsonlSource
from megatron_sr1.data.sources.source import IMAGE_COLUMNS, Chunk, Problem, RawSample, load_images
from megatron_sr1.data.sources.turns import TURN_COLUMNS, speaker_and_text

_ID = "id"
_KNOWN = (_ID, *IMAGE_COLUMNS, *TURN_COLUMNS)


@dataclass(frozen=True)
class LlavaSource:
    """`path`: of .json and .jsonl; `images`: the folder where paths begin; None: that of the file that names them."""

    path: str
    images: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order. Raises ValueError as `find_files`, or where there are files of both kinds."""
        return self._rows.files

    @cached_property
    def _rows(self) -> JsonlSource | JsonSource:
        files = find_files(self.path, (JSON_SUFFIX, *JSONL_SUFFIXES))
        arrays = [file for file in files if file.suffix.lower() == JSON_SUFFIX]
        if arrays and len(arrays) < len(files):
            raise ValueError(f"{self.path}: it has .json and .jsonl files. Build each kind by itself.")
        return (JsonSource if arrays else JsonlSource)(self.path, _WholeRow(), self.images, files)

    def chunks(self) -> Iterator[Chunk]:
        """Raises ValueError as the sources of JSON."""
        return self._rows.chunks()

    def read(self, chunk: Chunk) -> Iterator[RawSample | Problem]:
        """All samples of each row, or one problem."""
        for row in self._rows.read(chunk):
            if isinstance(row, Problem):
                yield row
                continue
            try:
                yield from _samples(row)
            except ValueError as error:
                kind = "placeholders" if isinstance(error, _Marks) else "field"
                yield Problem(row.where, row.key, kind, f"{_called(row.fields)}{error}")


class _Marks(ValueError):
    """Marks of images that are not those of the row's images."""


class _WholeRow:
    """A row with all its columns, and the bytes of its images."""

    @property
    def asked_for(self) -> Collection[str]:
        return ()

    def check(self, names: Sequence[str], file: Path) -> None:
        """Rows of JSON have no columns in common."""

    def sample(
        self, row: Mapping[str, Any], key: str, where: str, load_image: Callable[[object], bytes]
    ) -> RawSample | Problem:
        given = [name for name in IMAGE_COLUMNS if row.get(name)]
        if len(given) > 1:
            return Problem(where, key, "image_columns", f"{_called(row)}it has images and image: leave one out")
        named = row[given[0]] if given else []
        loaded = load_images(named if isinstance(named, list) else [named], load_image)
        if isinstance(loaded, str):
            return Problem(where, key, "unreadable_image", f"{_called(row)}{loaded}")
        return RawSample(where, key, row, loaded)


def _called(row: Mapping[str, Any]) -> str:
    return f"row {row[_ID]!r}: " if row.get(_ID) not in (None, "") else ""


def _samples(row: RawSample) -> Iterator[RawSample]:
    """Raises ValueError where the turns are not questions and answers by turns."""
    column = _column(row.fields)
    turns = row.fields[column]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"its {column} must be a list of turns, {{from, value}} or {{role, content}}")
    spoken = [speaker_and_text(column, turn) for turn in turns]
    system = [spoken.pop(0)[1]] if spoken and spoken[0][0] == "system" else []
    speakers = [speaker for speaker, _ in spoken]
    unknown = next((name for name in speakers if name not in ("user", "assistant", "system")), None)
    if unknown is not None:
        raise ValueError(
            f"a turn of its {column} is by {unknown!r}; known are human (user), gpt (assistant) and system"
        )
    if not spoken or speakers != ["user", "assistant"] * (len(spoken) // 2):
        raise ValueError(
            f"its {column} are the turns {', '.join(speakers) or 'of nobody'}; they must be a question (human) and its "
            "answer (gpt) by turns, with a system turn in front at most"
        )
    marks = [text.count(IMAGE_MARK) for _, text in spoken]
    if IMAGE_MARK in "".join(system) or any(marks[1::2]):
        raise _Marks(f"{IMAGE_MARK} stands in a turn that asks nothing: images belong to questions")
    num_marks, num_images = sum(marks), len(row.images)
    if num_marks not in (0, num_images) or (num_images > 1 and not num_marks and len(spoken) > 2):
        raise _Marks(f"{num_marks} times {IMAGE_MARK} in its {column}, but {num_images} images")
    metadata = {name: value for name, value in row.fields.items() if name not in _KNOWN}
    for number, end in enumerate(range(1, len(spoken), 2)):
        # without marks they stand in front of the first question
        shown = sum(marks[:end]) if num_marks else num_images
        fields = {"problem": _asked(system, spoken[:end]), "answer": spoken[end][1], "metadata": metadata}
        if not metadata:
            del fields["metadata"]
        key = f"{row.key}-{number}" if len(spoken) > 2 else row.key
        lacks = "it is a conversation, where that is an image, but has none"
        yield RawSample(row.where, key, fields, row.images[:shown], changes=("conversation",), lacks_image=lacks)


def _column(row: Mapping[str, Any]) -> str:
    given = [name for name in TURN_COLUMNS if name in row]
    if len(given) != 1:
        found = "both conversations and messages" if given else f"the columns {', '.join(row)}"
        raise ValueError(f"it has {found}; one of conversations and messages is needed")
    if row.get("system"):
        raise ValueError("its column 'system' is said beside the conversation: make it the first turn, by system")
    return given[0]


def _asked(system: Sequence[str], turns: Sequence[tuple[str, str]]) -> str:
    """The last question, behind what was said before."""
    *before, (_, question) = turns
    if not before:
        return "\n\n".join([*system, question])
    names = {"user": "User", "assistant": "Assistant"}
    said = [f"{names[speaker]}: {text.strip()}" for speaker, text in before]
    return "\n\n".join([*system, *said, f"User: {question.strip()}"])
