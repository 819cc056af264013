"""What controls of the second pass need of a prompt, which its record keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_sr1.data.shown import digest_of_images
from megatron_sr1.evaluation.records import Material
from megatron_sr1.rollout.later import other_questions
from megatron_sr1.types import LaterPass, Prompt

_QUESTIONS = "other_question"  # what its pass would be called


def material_of(prompt: Prompt, gold_field: str, questions_field: str) -> Material:
    """What controls need of a prompt with images.

    Raises:
        ValueError: see `check_material`.
    """
    gold, questions = gold_text(prompt, gold_field), ()
    if questions_field and prompt.metadata.get(questions_field) is not None:
        questions = tuple(other_questions(prompt, LaterPass(_QUESTIONS, question=questions_field)))
    return Material(digest_of_images(prompt.images), gold, questions)


def gold_text(prompt: Prompt, field: str) -> str | None:
    """The metadata's `field` as a text: a list is joined by commas, without what is blank; None where nothing is left.

    Raises:
        ValueError: it is neither a text nor a list of texts and numbers.
    """
    value = prompt.metadata.get(field)
    parts = [value] if value is None or isinstance(value, str) else value
    if not isinstance(parts, Sequence) or not all(
        part is None or isinstance(part, str | int | float) for part in parts
    ):
        raise ValueError(
            f"sample {prompt.key!r}: the metadata's {field!r}, which evaluate.gold_field names, is {value!r}: it must "
            "be a text or a list of texts. Correct the sample, or name another field."
        )
    text = ", ".join(str(part).strip() for part in parts if part is not None and str(part).strip())
    return text or None


def check_material(prompt: Prompt, gold_field: str, questions_field: str) -> None:
    """
    Raises:
        ValueError: a field of the metadata that a control reads or asks is there, and is not what it must be.
    """
    if prompt.images:
        material_of(replace(prompt, images=()), gold_field, questions_field)
