"""RealWorldQA (`xai-org/RealworldQA`) and VisNumBench (arXiv 2503.14939, `GML-FMGroup/VisNumBench`)."""

from __future__ import annotations

from megatron_sr1.data.benchmarks.item import Item, SourceRow, answer_of, image_of, some, text
from megatron_sr1.data.benchmarks.options import (
    ANSWER_WITH_LETTER,
    ask,
    gold_letter,
    split_lettered_lines,
    split_parenthesised,
)

# The set's own instructions, which forbid the reasoning that the templates ask for; "letter": of options
_INSTRUCTIONS = {
    "Please answer directly with only the letter of the correct option and nothing else.": "letter",
    "Please answer directly with a single word or number.": "word",
}


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
    return Item(question, answer, choices=options, images=(image_of(row, "image"),))


def visnumbench(row: SourceRow) -> Item:
    """One question of VisNumBench; by attribute (Angle, Depth ...) is how its results are reported.

    Fields: id (not unique: both scenes count from 0), question or text, option ("(a) 0.92 (b) 0.61 ..."), answer
    ("(a) 0.92"), image (bytes) or image_path, Attributes or Major_categories, task_class.
    """
    options = split_parenthesised(text(row, "option"))
    problem = ask(text(row, "question", "text"), options)
    gold = gold_letter(answer_of(row, "answer"), len(options))
    attribute = text(row, "Attributes", "Major_categories")
    image = image_of(row, "image", "image_path")
    return Item(problem, gold, attribute, "", options, (image,), some(row, "id", "task_class"))
