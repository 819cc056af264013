"""What a later pass is asked: from which text, which question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sr1.prompts import is_text, metadata_text
from megatron_sr1.types import LaterPass, Prompt, Question


@dataclass(frozen=True)
class OpenReading:
    """One sample of a later pass, before it is answered."""

    later: LaterPass
    number: int  # among the samples of the pass
    context: str | None  # in place of the image; None: nothing
    question: Question | None  # None: the prompt's own

    def problem(self, prompt: Prompt) -> str:
        """The question's text."""
        return prompt.problem if self.question is None else self.question.problem


def ask_later(later: LaterPass, prompt: Prompt, text: str | None) -> list[OpenReading]:
    """All samples of a pass, from the text of its context; a pass from nothing takes None.

    Raises:
        ValueError: see `other_questions`.
    """
    questions = other_questions(prompt, later)
    return [
        OpenReading(later, number, text, questions[number % len(questions)] if questions else None)
        for number in range(later.samples)
    ]


def metadata_context(prompt: Prompt, later: LaterPass) -> str:
    """The text of `metadata[field]`: a string, or several, which are joined by commas.

    Raises:
        ValueError: the sample has no such text.
    """
    return metadata_text(prompt, later.field, f"the pass {later.name!r}", "take the pass out of objective.passes")


def other_questions(prompt: Prompt, later: LaterPass) -> list[Question]:
    """Those of `metadata[question]`: a mapping with problem, answer and perhaps choices, or a list of such; [] where
    the pass asks the prompt's own.

    Raises:
        ValueError: the sample has none, or one that is no question.
    """
    if not later.question:
        return []
    value = prompt.metadata.get(later.question)
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence) or not entries or not all(map(_is_question, entries)):
        raise ValueError(
            f"sample {prompt.key!r}: the pass {later.name!r} asks the metadata's {later.question!r}, which is "
            f"{value!r}: it must be a list of {{problem: ..., answer: ...}}. Correct the sample, or take the pass out "
            "of objective.passes."
        )
    return [Question(entry["problem"], entry["answer"], tuple(entry.get("choices", ()))) for entry in entries]


def check_metadata(prompt: Prompt, later: Sequence[LaterPass]) -> None:
    """
    Raises:
        ValueError: the sample lacks what a later pass reads or asks.
    """
    for one in later:
        if one.context == "metadata":
            metadata_context(prompt, one)
        other_questions(prompt, one)


def _is_question(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return False
    choices = entry.get("choices", ())
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        return False
    texts = [entry.get("problem"), entry.get("answer"), *choices]
    return all(map(is_text, texts))
