"""POPE (arXiv 2305.10355, `lmms-lab/POPE`), the discriminative part of AMBER (arXiv 2311.07397,
`junyangwang0410/AMBER`) and HallusionBench (arXiv 2310.14566, `tianyi-lab/HallusionBench` or
`lmms-lab/HallusionBench`): questions of yes or no. `evaluation/yes_no.py` has their metrics.
"""

from __future__ import annotations

from megatron_sr1.data.benchmarks.item import BadRow, Item, SourceRow, answer_of, image_of, some, text
from megatron_sr1.data.yes_no import WORDS, YesNo

ANSWER_YES_OR_NO = "Answer yes or no."
POPE_CATEGORIES = ("random", "popular", "adversarial")
AMBER_LABELS = "annotations.json"  # the file with type and truth of each id
_AMBER_CATEGORIES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute/state",
    "discriminative-attribute-number": "attribute/number",
    "discriminative-attribute-action": "attribute/action",
    "discriminative-relation": "relation",
    "relation": "relation",  # how the file calls those whose truth is no
}
_YES_NO = {"0": "No", "1": "Yes"}


def pope(row: SourceRow) -> Item:
    """One question of POPE; the positive answer of its precision, recall and F1 is yes.

    Fields: question_id (from 1 in each category), question or text, answer or label (yes, no), category (random,
    popular, adversarial: how absent objects were chosen), image (bytes or a path), image_source.
    """
    if row.get("category") is None:
        raise BadRow(
            "field",
            f"it has no category ({', '.join(POPE_CATEGORIES)}), by which results are reported; where the file's name "
            "tells it, add it to every row",
        )
    category = text(row, "category").lower()
    if category not in POPE_CATEGORIES:
        raise BadRow("field", f"category={category!r} must be one of {', '.join(POPE_CATEGORIES)}")
    metadata = {**some(row, "image_source"), **YesNo(positive="yes").entry()}
    key = f"{category}/{text(row, 'question_id')}"
    image = image_of(row, "image")
    return Item(_ask(row, "question", "text"), _word(row, "answer", "label"), category, key, (), (image,), metadata)


def amber(row: SourceRow) -> Item:
    """One question of AMBER's discriminative task; the positive answer of its precision, recall and F1 is no: that what
    is asked for is not there.

    Fields: id, image (a path, or bytes), query; and of `annotations.json`, or in the same row: type
    (discriminative-hallucination, discriminative-attribute-state ...), truth (yes, no).
    """
    if row.get("type") is None or row.get("truth") is None:
        raise BadRow(
            "empty_answer",
            f"it has no type and truth; they are in the authors' {AMBER_LABELS}, which belongs into the folder of this "
            "file or the one above",
        )
    kind = text(row, "type")
    if kind == "generative":
        raise BadRow("field", "it asks for a description, which no yes or no answers")
    if kind not in _AMBER_CATEGORIES:
        raise BadRow("field", f"type={kind!r} must be one of {', '.join(_AMBER_CATEGORIES)}")
    image, metadata = image_of(row, "image"), {"type": kind, **YesNo(positive="no").entry()}
    key, category = text(row, "id"), _AMBER_CATEGORIES[kind]
    return Item(_ask(row, "query"), _word(row, "truth"), category, key, (), (image,), metadata)


def hallusionbench(row: SourceRow) -> Item:
    """One question of HallusionBench.

    Fields: category (VD, VS), subcategory, set_id, figure_id, question_id, question, gt_answer (1: yes, 0: no),
    visual_input (0: without image; 1: the original, 2: an edited one), image (bytes) or filename. A question keeps its
    number over all figures of a set: the metadata name what qAcc and fAcc group by. The authors also accept "uncertain"
    where visual_input is 0; here it is wrong.
    """
    names = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
    parts = {name: text(row, name) for name in names}
    answer = answer_of(row, "gt_answer")
    if answer not in _YES_NO:
        raise BadRow("field", f"gt_answer={answer!r} must be 1 or 0")
    images = () if parts["visual_input"] == "0" else (image_of(row, "image", "filename"),)
    category = f"{parts['category']}/{parts['subcategory']}"
    figure = f"{category}/{parts['set_id']}_{parts['figure_id']}"
    asked = YesNo(
        question=f"{category}/{parts['set_id']}_{parts['question_id']}",
        figure=figure if images else "",
    )
    key, metadata = f"{figure}_{parts['question_id']}", {**parts, **asked.entry()}
    return Item(_ask(row, "question"), _YES_NO[answer], category, key, images=images, metadata=metadata)


def _ask(row: SourceRow, *names: str) -> str:
    """Raises BadRow where the question is blank."""
    question = text(row, *names)
    if not question:
        raise BadRow("field", f"its {' or '.join(names)} is blank")
    return f"{question}\n{ANSWER_YES_OR_NO}"


def _word(row: SourceRow, *names: str) -> str:
    """The gold answer, as our sets write it. Raises BadRow."""
    answer = answer_of(row, *names)
    if answer.lower() not in WORDS:
        raise BadRow("field", f"its {' or '.join(names)} {answer!r} must be yes or no")
    return answer.capitalize()
