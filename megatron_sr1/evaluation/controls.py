"""Controls of the second pass: what its accuracy would be if the description were not this image's, or not there.

    prior            the question alone, by the plain template: nothing is described
    shuffled         what a response to another image's prompt describes, where there is one for the same question
    gold             what the metadata says that the image shows
    reference        this response's description, read by the weights that the policy began with
    other_question   this response's description, and another question about the same image

Each is one request without an image, for each sample of a prompt that has a second pass, when all prompts are answered
and recorded: what is recorded by then says what is read and asked, so a control changes nothing of it and can be asked
for later. Who lends a description is the next record, in a circle, that shows another image and whose sample of the
same number has described it: one of the same question, where there is any, whatever lies between. Who lends a question
is the next that shows the same image and asks something else, where the metadata has none.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from megatron_sr1.config.evaluation import CONTROLS
from megatron_sr1.evaluation.records import ControlAnswer, Record, read_record, whole_lines
from megatron_sr1.types import Prompt, Question

Place = tuple[int, int, str]  # number of the record, of the sample, and the control
_OWN = ("reference", "other_question")  # that read what the response itself describes


@dataclass(frozen=True)
class ControlTask:
    """A question that a control asks."""

    place: Place
    key: str  # of its request
    lender: int | None = None  # number of the record whose description is read, or whose question is asked
    same_question: bool | None = None  # whether it has described for this question


@dataclass(frozen=True)
class _Known:
    """What is kept of a record while tasks are made."""

    offset: int  # in the file
    key: str
    problem: str
    shown: str  # "": it is not known
    described: tuple[bool, ...]  # by sample
    has_gold: bool
    has_question: bool


def has_controls(record: Record) -> bool:
    """Whether it has a second pass that there is something to compare with."""
    return record.described and record.second_pass


class ControlTasks:
    """All tasks of a file of records, in its order."""

    def __init__(self, path: Path, controls: Collection[str], reader: str) -> None:
        """
        Args:
            controls: names; what is done of others is left as it is.
            reader: model directory of the start, whose answers count for `reference`.
        """
        self._path = path
        self._known: dict[int, _Known] = {}
        self._names = [name for name in CONTROLS if name in controls]
        self.done: set[Place] = set()
        self.num_unknown = 0  # records that do not say what controls need
        start = 0
        for index, (record, end) in enumerate(whole_lines(path, read_record)):
            if has_controls(record):
                self._known[index] = _known(record, start)
                self.num_unknown += record.material is None
                self.done |= {
                    (index, number, name)
                    for number, sample in enumerate(record.samples)
                    for name, answer in sample.controls.items()
                    if answer.reader == (reader if name == "reference" else "")
                }
            start = end
        lenders = _Lenders(self._known)
        self.tasks = [task for index in self._known for task in self._of(index, lenders)]

    def prompt(self, task: ControlTask) -> Prompt:
        """What is asked, as a prompt without images. Any thread may call it."""
        index, number, name = task.place
        record = self._read(index)
        question = Question(record.problem, record.answer, record.choices)
        given: str | None = None
        if name in _OWN:
            given = record.samples[number].description
        elif name == "gold":
            assert record.material is not None
            given = record.material.gold
        elif task.lender is not None:
            given = self._read(task.lender).samples[number].description
        if name == "other_question":
            question = self._other_question(record, task.lender)
        assert (given is None) == (name == "prior"), task
        metadata = {"choices": list(question.choices)} if question.choices else {}
        return Prompt(task.key, question.problem, question.answer, (), record.source, metadata, given)

    def answer(self, task: ControlTask) -> ControlAnswer:
        """Without its response: what the task says of it."""
        lent_by = "" if task.lender is None else self._known[task.lender].key
        return ControlAnswer(None, False, lent_by, task.same_question)

    def _of(self, index: int, lenders: _Lenders) -> Iterator[ControlTask]:
        known = self._known[index]
        for number, has_own in enumerate(known.described):
            for name in self._names:
                task = ControlTask((index, number, name), f"{known.key}/{number}/{name}")
                if name == "shuffled":
                    found = lenders.description(index, number)
                    if found is not None:
                        yield replace(task, lender=found[0], same_question=found[1])
                elif name == "other_question":
                    lender = None if known.has_question or not has_own else lenders.question(index)
                    if has_own and (known.has_question or lender is not None):
                        yield replace(task, lender=lender)
                elif name == "prior" or (name == "gold" and known.has_gold) or (name == "reference" and has_own):
                    yield task

    def _other_question(self, record: Record, lender: int | None) -> Question:
        if lender is None:
            assert record.material is not None
            return record.material.questions[0]
        other = self._read(lender)
        return Question(other.problem, other.answer, other.choices)

    def _read(self, index: int) -> Record:
        with self._path.open("rb") as file:
            file.seek(self._known[index].offset)
            return read_record(json.loads(file.readline()))


class _Lenders:
    """Who can lend what."""

    def __init__(self, known: Mapping[int, _Known]) -> None:
        self._known = known
        self._all: dict[int, list[int]] = {}  # records whose sample of a number is described
        self._alike: dict[tuple[int, str], list[int]] = {}  # the same of one question
        self._shows: dict[str, list[int]] = {}  # records by what they show
        for index, one in known.items():
            if not one.shown:
                continue
            self._shows.setdefault(one.shown, []).append(index)
            for number, described in enumerate(one.described):
                if described:
                    self._all.setdefault(number, []).append(index)
                    self._alike.setdefault((number, one.problem), []).append(index)
        self._images = {number: {known[index].shown for index in indices} for number, indices in self._all.items()}

    def description(self, index: int, number: int) -> tuple[int, bool] | None:
        """The record that lends one, and whether for the same question; None: no other image is described."""
        own = self._known[index]
        if not own.shown or not self._images.get(number, set()) - {own.shown}:
            return None

        def is_other(other: int) -> bool:
            return self._known[other].shown != own.shown

        alike = _next(self._alike.get((number, own.problem), ()), index, is_other)
        if alike is not None:
            return alike, True
        other = _next(self._all[number], index, is_other)
        assert other is not None, "one of them shows another image"
        return other, False

    def question(self, index: int) -> int | None:
        """The record that lends one; None: nothing else is asked of what is shown."""
        own = self._known[index]
        shown = self._shows.get(own.shown, ()) if own.shown else ()
        return _next(shown, index, lambda other: self._known[other].problem != own.problem)


def with_answers(records: Iterator[Record], answers: Mapping[Place, ControlAnswer]) -> Iterator[Record]:
    """The records with these answers in them, those of one sample in the order of CONTROLS."""
    for index, record in enumerate(records):
        samples = []
        for number, sample in enumerate(record.samples):
            found = {name: answers[place] for name in CONTROLS if (place := (index, number, name)) in answers}
            both = {**sample.controls, **found}
            samples.append(replace(sample, controls={name: both[name] for name in CONTROLS if name in both}))
        yield replace(record, samples=tuple(samples))


def _known(record: Record, offset: int) -> _Known:
    material = record.material
    return _Known(
        offset,
        record.key,
        record.problem,
        "" if material is None else material.shown,
        tuple(sample.description is not None for sample in record.samples),
        material is not None and material.gold is not None,
        material is not None and bool(material.questions),
    )


def _next(sorted_indices: Sequence[int], index: int, fits: Callable[[int], bool]) -> int | None:
    """The first one that fits behind `index`, in a circle."""
    start = bisect_right(sorted_indices, index)
    places = chain(range(start, len(sorted_indices)), range(start))
    return next((sorted_indices[place] for place in places if fits(sorted_indices[place])), None)
