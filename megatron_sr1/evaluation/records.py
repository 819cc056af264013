"""What was answered to each prompt and how it was graded: one JSON object a prompt.

A file of records is whole: what is not finished is in parts (`parts.py`). Earlier releases wrote it in chunks, whose
last record is marked; one that they have left unfinished goes on after its last whole chunk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_sr1.data.yes_no import WORDS, YesNo, gold_word, yes_no_of
from megatron_sr1.prompts import SEE_THINK, Template
from megatron_sr1.rewards import faithful, grade
from megatron_sr1.types import Prompt, Question, Rollout, RolloutGroup, RolloutPair, TemplateName

Element = TypeVar("Element")


@dataclass(frozen=True)
class Response:
    """One response, without its ids."""

    text: str
    tokens: int
    finish_reason: str  # stop, or length: it was cut


@dataclass(frozen=True)
class Verdict:
    """What the judge made of a description."""

    model: str
    answer: str  # its whole response
    right: bool  # that holds the gold answer


@dataclass(frozen=True)
class ControlAnswer:
    """What a control of the second pass led to, see `controls.py`."""

    response: Response | None  # None: the engine does not take it, or the gold text is longer than a description may be
    right: bool
    lent_by: str = ""  # key of the sample whose description was read, or whose question was asked
    same_question: bool | None = None  # whether it has described for this question; None: no description was lent
    reader: str = ""  # model directory of the start, where that has read; "": the policy has


@dataclass(frozen=True)
class Material:
    """What controls need of a prompt beyond its record."""

    shown: str  # digest of its images
    gold: str | None = None  # what the metadata says that they show
    questions: tuple[Question, ...] = ()  # others about them, of the metadata


@dataclass(frozen=True)
class Sample:
    """One sample of a prompt. `second` and `judge` are None where there is none, whatever the reason."""

    first: Response
    description: str | None
    description_cut: bool
    second: Response | None
    # ours, each 0.0 or 1.0 and of a pass' first sample; those of the user that are trained on, any number; the mean of
    # several samples of another pass
    rewards: Mapping[str, float]
    faithful: bool | None  # None: it is not known what the image shows
    judge: Verdict | None = None
    further: Mapping[str, tuple[Response, ...]] = field(default_factory=dict)  # the other later passes, by name
    said: str | None = None  # yes, no, or "" for neither, and the gold exactly where acc is 1; None: another question
    controls: Mapping[str, ControlAnswer] = field(default_factory=dict)  # by name


@dataclass(frozen=True)
class Record:
    """All samples of one prompt."""

    key: str
    source: str
    problem: str
    answer: str
    num_images: int
    template: TemplateName  # of the first pass
    samples: tuple[Sample, ...]
    made_of: str  # digest of the identity of the evaluation
    ends_chunk: bool
    choices: tuple[str, ...] = ()  # of the prompt
    described: bool = False  # whether a description was asked for; without, there is nothing that could suffice or leak
    second_pass: bool = True  # whether one is asked for where there is a description
    yes_no: YesNo | None = None  # how its answers are counted, where it is a yes-or-no question
    material: Material | None = None  # None: no second pass, or a record of an earlier release


def record_of(
    group: RolloutGroup,
    template: Template,
    rewards: Sequence[Mapping[str, float]],
    made_of: str,
    ends_chunk: bool,
    *,
    second_pass: bool = True,
    material: Material | None = None,
) -> Record:
    """
    Args:
        template: of the first pass.
        rewards: one vector per sample of the group.

    Raises:
        ValueError: as `yes_no_of`.
    """
    prompt = group.prompt
    yes_no = yes_no_of(prompt)
    pairs = zip(group.pairs, rewards, strict=True)
    samples = tuple(_sample(pair, prompt, vector) for pair, vector in pairs)
    if yes_no is not None:
        texts = zip(samples, group.pairs, strict=True)
        samples = tuple(
            replace(sample, said=_said(template.answer_of(pair.first.response_text), prompt, sample.rewards))
            for sample, pair in texts
        )
    return Record(
        prompt.key,
        prompt.source,
        prompt.problem,
        prompt.answer,
        len(prompt.images),
        template.name,
        samples,
        made_of,
        ends_chunk,
        prompt.choices,
        template.describes is not None,
        second_pass,
        yes_no,
        material,
    )


def write_line(record: Record) -> bytes:
    """The record as one line of JSON."""
    return json_line(asdict(record))


def json_line(fields: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(fields, ensure_ascii=False).encode("utf-8") + b"\n"


def replace_records(path: Path, records: Iterable[Record]) -> None:
    """Rewrites all records; until the last one is written the old file stays."""
    replace_lines(path, map(write_line, records))


def replace_lines(path: Path, lines: Iterable[bytes]) -> None:
    """The same with the records as lines."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_records(path: Path) -> Iterator[Record]:
    """The records of whole lines, one at a time; a last line without an end, which a kill leaves behind, is no record.

    Raises:
        ValueError: another line is not a record; the message names file and line.
    """
    for record, _ in whole_lines(path, read_record):
        yield record


def drop_unfinished(path: Path, made_of: str) -> list[str]:
    """Cuts the file behind its last whole chunk and returns the keys of what remains, in order. No file: no keys.

    Raises:
        ValueError: as `read_records`; a record is not of the evaluation with this digest.
    """
    if not path.exists():
        return []
    keys: list[str] = []
    num_kept = end_kept = 0
    for record, end in whole_lines(path, read_record):
        if record.made_of != made_of:
            raise ValueError(other_evaluation(path, record.key, record.made_of, made_of))
        keys.append(record.key)
        if record.ends_chunk:
            num_kept, end_kept = len(keys), end
    os.truncate(path, end_kept)
    return keys[:num_kept]


def other_evaluation(path: Path, key: str, then: str, now: str) -> str:
    """Says that a record was made of something else."""
    return (
        f"{path}: record {key!r} is of another evaluation, {then}, not {now}. Choose another run_dir, or start over "
        "with --restart."
    )


def whole_lines(path: Path, read: Callable[[Any], Element]) -> Iterator[tuple[Element, int]]:
    """What `read` makes of each line's JSON, and the offset behind the line; not of a last line without an end.

    Raises:
        ValueError: `read` has raised ValueError, KeyError or TypeError, or it is no JSON; the message names file and
            line.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                found = read(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} is not a record of an evaluation ({error}). Restore the file, or start over "
                    "with --restart."
                ) from error
            yield found, end


def read_record(fields: dict[str, Any]) -> Record:
    """Of the JSON of its line. Raises ValueError, KeyError or TypeError where it is none."""
    samples = tuple(map(_read_sample, fields["samples"]))
    described = fields.get("described", fields["template"] == SEE_THINK.name)  # records of earlier releases do not say
    choices = tuple(fields.get("choices", ()))
    yes_no = None if fields.get("yes_no") is None else YesNo(**fields["yes_no"])
    read = {"samples": samples, "choices": choices, "described": described, "yes_no": yes_no}
    read["material"] = _read_material(fields.get("material"))
    return Record(**{**fields, **read})


def _read_sample(fields: dict[str, Any]) -> Sample:
    second, judge = fields["second"], fields["judge"]
    parts = {
        "first": Response(**fields["first"]),
        "second": None if second is None else Response(**second),
        "judge": None if judge is None else Verdict(**judge),
        "further": {
            name: tuple(Response(**response) for response in responses)
            for name, responses in fields.get("further", {}).items()
        },
        "controls": {name: read_control(answer) for name, answer in fields.get("controls", {}).items()},
    }
    return Sample(**{**fields, **parts})


def _read_material(fields: dict[str, Any] | None) -> Material | None:
    if fields is None:
        return None
    asked = (Question(one["problem"], one["answer"], tuple(one["choices"])) for one in fields["questions"])
    return Material(**{**fields, "questions": tuple(asked)})


def read_control(fields: dict[str, Any]) -> ControlAnswer:
    """Of the JSON that `asdict` makes of it."""
    response = fields["response"]
    return ControlAnswer(**{**fields, "response": None if response is None else Response(**response)})


def _sample(pair: RolloutPair, prompt: Prompt, rewards: Mapping[str, float]) -> Sample:
    second = None if pair.second is None else _response(pair.second)
    truth = faithful(pair.description, prompt)
    further: dict[str, tuple[Response, ...]] = {}
    for reading in pair.further:
        further[reading.pass_name] = (*further.get(reading.pass_name, ()), _response(reading.rollout))
    how = (pair.description, pair.description_cut, second, dict(rewards), truth)
    return Sample(_response(pair.first), *how, further=further)


def _said(answer: str | None, prompt: Prompt, rewards: Mapping[str, float]) -> str:
    """Yes, no, or "" for neither, by the grader that also tells whether it is right."""
    gold = gold_word(prompt.answer)
    if rewards["acc"] == 1.0:
        return gold
    (other,) = (word for word in WORDS if word != gold)
    return other if answer is not None and grade(answer, other) else ""


def _response(rollout: Rollout) -> Response:
    return Response(rollout.response_text, len(rollout.response_ids), rollout.finish_reason)
