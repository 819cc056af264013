"""MathVerse (arXiv 2403.14624, `AI4Math/MathVerse`) and MATH-Vision (arXiv 2402.14804, `MathLLMs/MathVision`)."""

from __future__ import annotations

from megatron_sr1.data.benchmarks.item import BadRow, Item, SourceRow, answer_of, some, text
from megatron_sr1.data.benchmarks.marks import QUESTION_IN_IMAGE, drop_leading, name_parts
from megatron_sr1.data.benchmarks.options import (
    ANSWER_WITH_LETTER,
    ask,
    gold_letter,
    parse_options,
    split_lettered_lines,
)

TEXT_ONLY = "Text Only"
_CHOICES = "Choices:"


def mathverse(row: SourceRow) -> Item:
    """One version of a problem of MathVerse; by version is how its results are reported.

    Fields: sample_index, problem_index, problem_version (Text Dominant ... Vision Only; Text Only in a file of its
    own), question (empty in Vision Only; ends with "Choices:" and lines A:40°), image (bytes or a path), answer (a
    letter, or free text), question_type (multi-choice, free-form), metadata (subject, subfield, source).
    """
    version, answer = text(row, "problem_version"), answer_of(row, "answer")
    if row.get("image") in (None, "") and version != TEXT_ONLY:
        raise BadRow("placeholders", f"it has no image, which its version {version!r} needs")
    question, options = text(row, "question"), ()
    if row.get("question_type") == "multi-choice":
        question, options = split_lettered_lines(question)
        question = question.removesuffix(_CHOICES).rstrip()
        answer = gold_letter(answer, len(options) or 26)
        question = ask(question or QUESTION_IN_IMAGE, options) if options else _with_hidden_options(question)
    details = row.get("metadata")
    details = details if isinstance(details, dict) else {}
    return Item(
        question or QUESTION_IN_IMAGE,
        answer,
        version,
        f"{version}/{text(row, 'sample_index')}",
        options,
        () if row.get("image") in (None, "") else (row["image"],),
        {**some(row, "problem_index", "question_type"), **some(details, "subject", "subfield", "source")},
    )


def _with_hidden_options(question: str) -> str:
    """Its options are in the image, or inside the text."""
    return f"{question or QUESTION_IN_IMAGE}\n{ANSWER_WITH_LETTER}"


def math_vision(row: SourceRow) -> Item:
    """One problem of MATH-Vision.

    Fields: id, question with marks <image1>, options (a list, empty for a free answer; A to E where they are drawn),
    image (a path) or decoded_image (bytes), answer (a letter, or free text), level (1 to 5), subject. There is one
    image, also where the text has marks <image1> to <image7>: they name its parts.
    """
    image = row["decoded_image"] if row.get("decoded_image") is not None else row.get("image")
    if image is None:
        raise BadRow("placeholders", "it has no image")
    question, answer = name_parts(drop_leading(text(row, "question"))), answer_of(row, "answer")
    options = tuple(name_parts(option) for option in parse_options(row.get("options")))
    if options:
        question, answer = ask(question, options), gold_letter(answer, len(options))
    return Item(question, answer, text(row, "subject"), text(row, "id"), options, (image,), some(row, "level"))
