"""RealWorldQA (`xai-org/RealworldQA`), VisNumBench (arXiv 2503.14939, `GML-FMGroup/VisNumBench`) and HallusionBench
(arXiv 2310.14566, `tianyi-lab/HallusionBench` or `lmms-lab/HallusionBench`).
"""

from __future__ import annotations

from megatron_sr1.data.benchmarks.item import BadRow, Item, SourceRow, answer_of, some, text
from megatron_sr1.data.benchmarks.options import (
    ANSWER_WITH_LETTER,
    ask,
    gold_letter,
    split_lettered_lines,
    split_parenthesised,
)

ANSWER_YES_OR_NO = "Answer yes or no."
# The set's own instructions, which forbid the reasoning that the templates ask for; "letter": of options
_INSTRUCTIONS = {
    "Please answer directly with only the letter of the correct option and nothing else.": "letter",
    "Please answer directly with a single word or number.": "word",
}
_YES_NO = {"0": "No", "1": "Yes"}


def realworldqa(row: SourceRow) -> Item:
    """One question of RealWorldQA.

    Fields: image, question (ends with lines A. Left, B. Right ..., and an instruction how to answer), answer (a letter,
    a word or a number).
    """
    question, answer = text(row, "question"), answer_of(row, "answer")
    asked_for = ""
    for instruction, form in _INSTRUCTIONS.items():
        if instruction in question:
            question, asked_for = question.replace(instruction, "").strip(), form
    question, options = split_lettered_lines(question)
    if options:
        question, answer = ask(question, options), gold_letter(answer, len(options))
    elif asked_for == "letter":
        question, answer = f"{question}\n{ANSWER_WITH_LETTER}", gold_letter(answer, 26)
    return Item(question, answer, choices=options, images=(_image(row, "image"),))


def visnumbench(row: SourceRow) -> Item:
    """One question of VisNumBench; by attribute (Angle, Depth ...) is how its results are reported.

    Fields: id (not unique: both scenes count from 0), question or text, option ("(a) 0.92 (b) 0.61 ..."), answer
    ("(a) 0.92"), image (bytes) or image_path, Attributes or Major_categories, task_class.
    """
    options = split_parenthesised(text(row, "option"))
    problem = ask(text(row, "question", "text"), options)
    gold = gold_letter(answer_of(row, "answer"), len(options))
    attribute = text(row, "Attributes", "Major_categories")
    image = _image(row, "image", "image_path")
    return Item(problem, gold, attribute, "", options, (image,), some(row, "id", "task_class"))


def hallusionbench(row: SourceRow) -> Item:
    """One question of HallusionBench.

    Fields: category (VD, VS), subcategory, set_id, figure_id, question_id, question, gt_answer (1: yes, 0: no),
    visual_input (0: without image; 1: the original, 2: an edited one), image (bytes) or filename. Key and metadata keep
    what its figure accuracy (all questions of a figure) and question-pair accuracy (one question over all figures of a
    set) group by. The authors also accept "uncertain" where visual_input is 0; here it is wrong.
    """
    names = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
    parts = {name: text(row, name) for name in names}
    answer = answer_of(row, "gt_answer")
    if answer not in _YES_NO:
        raise BadRow("field", f"gt_answer={answer!r} must be 1 or 0")
    images = () if parts["visual_input"] == "0" else (_image(row, "image", "filename"),)
    category = f"{parts['category']}/{parts['subcategory']}"
    key = f"{category}/{parts['set_id']}_{parts['figure_id']}_{parts['question_id']}"
    problem = f"{text(row, 'question')}\n{ANSWER_YES_OR_NO}"
    return Item(problem, _YES_NO[answer], category, key, images=images, metadata=parts)


def _image(row: SourceRow, *names: str) -> object:
    image = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if image is None:
        raise BadRow("placeholders", f"it has no image in {' or '.join(names)}")
    return image
