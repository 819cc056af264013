"""MMMU (arXiv 2311.16502, `MMMU/MMMU`) and MMMU-Pro (arXiv 2409.02813, `MMMU/MMMU_Pro`)."""

from __future__ import annotations

import re

from megatron_sr1.data.benchmarks.item import BadRow, Item, SourceRow, answer_of, some, text
from megatron_sr1.data.benchmarks.marks import QUESTION_IN_IMAGE, mentioned, place_images
from megatron_sr1.data.benchmarks.options import ANSWER_WITH_LETTER, ask, gold_letter, parse_options

NUM_IMAGES = 7  # columns image_1 to image_7
OPTIONS_IN_IMAGE = "The image shows a question and its options."
_SUBJECT = re.compile(r"(?:dev|validation|test)_(.+)_\d+")


def mmmu(row: SourceRow) -> Item:
    """One row of MMMU or of the standard settings of MMMU-Pro.

    Fields: id (validation_Accounting_1), question and options with marks <image 1>, options as a list in text,
    image_1 ... image_7, answer (a letter; of an open question text, or a list in text), question_type, explanation,
    subfield, topic_difficulty; MMMU-Pro has subject. Images that nothing but the explanation mentions are not shown.
    Where an open question accepts several answers, the first one is the gold, and all are in the metadata.
    """
    answer = answer_of(row, "answer")
    images = {n: row[f"image_{n}"] for n in range(1, NUM_IMAGES + 1) if row.get(f"image_{n}") is not None}
    hidden = mentioned(text(row, "explanation")) if row.get("explanation") else ()
    question, options, shown = place_images(text(row, "question"), parse_options(row.get("options")), images, hidden)
    question = question or QUESTION_IN_IMAGE
    metadata = some(row, "subfield", "topic_difficulty", "question_type")
    if row.get("question_type") == "open":
        accepted = list(parse_options(answer)) if answer.startswith(("['", '["')) else [answer]
        if not accepted:
            raise BadRow("empty_answer", "the list of its answers is empty")
        if len(accepted) > 1:
            metadata["accepted_answers"] = accepted
        return Item(question, accepted[0], _subject(row), text(row, "id"), images=shown, metadata=metadata)
    problem, gold = ask(question, options), gold_letter(answer, len(options))
    return Item(problem, gold, _subject(row), text(row, "id"), options, shown, metadata)


def mmmu_pro_vision(row: SourceRow) -> Item:
    """One row of the vision setting of MMMU-Pro: question and options are read from the image.

    Fields: id, image, options (a list in text), answer (a letter), subject.
    """
    if row.get("image") is None:
        raise BadRow("placeholders", "it has no image, which is where its question would be")
    options = parse_options(row.get("options"))
    gold = gold_letter(answer_of(row, "answer"), len(options))
    problem = f"{OPTIONS_IN_IMAGE} {ANSWER_WITH_LETTER}"
    return Item(problem, gold, _subject(row), text(row, "id"), options, (row["image"],))


def _subject(row: SourceRow) -> str:
    if row.get("subject") is not None:
        return text(row, "subject")
    key = text(row, "id")
    match = _SUBJECT.fullmatch(key)
    if match is None:
        raise BadRow("field", f"id={key!r} names no subject, as validation_Accounting_1 does")
    return match[1]
