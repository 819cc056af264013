"""Rows that would lose an image, an option or an answer without a word: made right, or left out with what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_sr1.data.build.samples import BuiltSample, Question, build_sample
from megatron_sr1.data.choices import ANSWER_WITH_LETTER
from megatron_sr1.data.sources.columns import Columns
from megatron_sr1.data.sources.source import Problem
from megatron_sr1.types import TemplateName
from tests.data_cases import png


class NoRules:
    max_prompt_tokens = None
    tokenizer = ""

    def prompt_tokens(self, question: Question) -> tuple[int, int] | None:
        return None

    def boxed_answer(self, template: TemplateName, response: str) -> str | None:
        return None


def built(row: Mapping[str, Any], **rename: str) -> dict[str, Any] | Problem:
    """The json of the one sample that is made of a row, or why it is left out."""
    raw = Columns(rename).sample({"problem": "Which?", "answer": "3", **row}, "k", "here", lambda _: png(1))
    made = raw if isinstance(raw, Problem) else build_sample(raw, NoRules())
    assert isinstance(made, BuiltSample | Problem)
    if isinstance(made, Problem):
        assert made.key == "k"
        return made
    return {**json.loads(dict(made.members)["json"]), "changes": made.changes, "num_images": len(made.image_sizes)}


def kept(row: Mapping[str, Any], **rename: str) -> dict[str, Any]:
    made = built(row, **rename)
    assert not isinstance(made, Problem), made.reason
    return made


def left_out(row: Mapping[str, Any], kind: str, reason: str) -> None:
    made = built(row)
    assert isinstance(made, Problem), made
    assert made.kind == kind and reason in made.reason


# ---------------------------------------------------------------- images that are named in the text alone
@pytest.mark.parametrize(
    "text",
    [
        "![](x.png) Which?",
        "Which? ![a chart](https://host/x.png)",
        '<img src="x.png"> Which?',
        "Is it <IMG src='x.png' width=3/>?",
        "<image 1> Which?",
        "What is in <image_2>?",
        "<|image_1|>\nWhich?",
    ],
)
def test_an_image_that_is_only_named_is_missing(text: str) -> None:
    left_out({"problem": text}, "placeholders", "and it has none: give it in the column images")
    left_out({"choices": ["red", text], "answer": "A"}, "placeholders", "and it has none")


@pytest.mark.parametrize(
    "text", ["What does `<img src='x.png'>` do?", "```html\n<img src=x>\n```\nWhat?", "Is a!b < c?"]
)
def test_code_names_no_image(text: str) -> None:
    assert kept({"problem": text})["problem"] == text


def test_links_to_images_that_are_there_are_marks() -> None:
    one = kept({"problem": "![](x.png)\nWhich?", "images": ["x.png"]})
    assert (one["problem"], one["changes"]) == ("Which?", ("image_marks",))
    two = kept({"problem": "Is ![](x.png) like <img src='y.png'>?", "images": ["x.png", "y.png"]})
    assert two["problem"] == "Is [image 1] like [image 2]?"
    left_out({"problem": "Is ![](x.png) like ![](y.png)?", "images": ["x.png"]}, "placeholders", "2 times <image>")
    text = "Is <image 1> like <image 2>?"
    assert kept({"problem": text, "images": ["x.png", "y.png"]})["problem"] == text
    left_out({"problem": text, "images": ["x.png"]}, "placeholders", "names the images 1 to 2, and it has 1")


def test_a_prompt_that_was_rendered_already_is_left_out() -> None:
    """Its marks would be read as text; alone inside a text without images they are text."""
    rendered = "<|vision_start|><|image_pad|><|vision_end|>Which?"
    left_out({"problem": rendered, "images": ["x.png"]}, "placeholders", "a mark of chat templates: write <image>")
    left_out({"problem": "<|image_pad|> Which?"}, "placeholders", "a mark of chat templates")
    text = "What does <|image_pad|> stand for?"
    assert kept({"problem": text})["problem"] == text


# ---------------------------------------------------------------- pixels as numbers
PIXELS = [[[1, 2, 3]] * 9] * 9


@pytest.mark.parametrize(
    "column",
    [
        {"img_rgb": PIXELS},
        {"pixel_values": [[0.5] * 9] * 9},
        {"img": PIXELS},
        {"image_array": [0] * 784},
        {"observation": PIXELS},
        {"pixels": [[0, 1], [1, 0]]},
    ],
)
def test_pixels_in_a_column_of_numbers_are_an_image(column: dict[str, Any]) -> None:
    (name,) = column
    left_out(column, "image_columns", f"the column {name!r} holds pixels as numbers")
    assert kept(column, **{name: ""}).get("metadata") is None
    assert kept(column, **{name: name})["metadata"] == column


@pytest.mark.parametrize(
    "column",
    [
        {"bbox": [1, 2, 3, 4]},
        {"boxes": [[1, 2, 3, 4]] * 9},
        {"polygons": [[[1, 2]] * 9] * 9},
        {"image_size": [640, 480]},
        {"matrix": [[0.5] * 9] * 9},
        {"scores": [0.5] * 784},
    ],
)
def test_other_numbers_are_metadata(column: dict[str, Any]) -> None:
    assert kept(column)["metadata"] == column
    assert kept({**column, "image": "x.png"})["num_images"] == 1


# ---------------------------------------------------------------- options
LABELLED = [{"label": "A", "text": "blue"}, {"label": "B", "text": "red"}]


def test_options_as_labelled_objects() -> None:
    made = kept({"choices": LABELLED, "answer": "B"})
    assert (made["choices"], made["answer"]) == (["blue", "red"], "B")
    assert made["problem"] == f"Which?\n(A) blue\n(B) red\n{ANSWER_WITH_LETTER}"
    left_out({"choices": LABELLED[::-1], "answer": "B"}, "field", "the labels B, A: write them as A, B, C ... in order")
    left_out({"choices": [LABELLED[0], "red"], "answer": "A"}, "field", "is a dict, not text")


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["B. Obama", "J. Biden"], "B. Obama", "A"),
        (["B. Obama", "J. Biden"], "J. Biden", "B"),
        (["Salmonella", "E. coli"], "E. coli", "B"),
        (["Paris", "Rome"], "Paris. ", "A"),
        (["Paris.", "Rome."], "rome", "B"),
        (["1e4", "1e3"], 1000, "B"),
        (["10,000", "1,000"], "1000", "B"),
        (["0.5", "0.25"], 0.50, "A"),
        ([True, False], False, "B"),
        (["No", "Yes"], True, "B"),
    ],
)
def test_an_answer_is_found_among_its_options(choices: list[object], answer: object, letter: str) -> None:
    made = kept({"choices": choices, "answer": answer})
    assert made["answer"] == letter and made["choices"] == [str(choice) for choice in choices]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"choices": ["A. red", "blue"], "answer": "A"}, "its option 'blue' has no label, and others have"),
        ({"choices": ["red", "B. blue", "C. pink"], "answer": "B"}, "its option 'red' has no label"),
        ({"choices": ["B. cat", "C. dog"], "answer": "B"}, "labels of their own, B, C"),
        ({"choices": ["B. Obama", "J. Biden"], "answer": "B"}, "can be the option B or the one that begins so"),
        ({"choices": ["1.0", "2.0", "3.0"], "answer": 2}, "can be the option B or C"),
        ({"problem": "Which?\nA. x\nB. y\nC. z\nD. w", "choices": ["x", "y", "z"], "answer": "D"}, "lists an option D"),
        ({"problem": "Which? (A) x (B) y (C) z", "choices": ["x", "y"], "answer": "A"}, "lists an option C"),
        (
            {"problem": "Which?\nA. x\nB. y", "choices": ["x", "y", "z"], "answer": "C"},
            "not the option C of its choices",
        ),
    ],
)
def test_options_that_do_not_fit_are_left_out(row: dict[str, Any], reason: str) -> None:
    left_out(row, "field", reason)


def test_what_follows_the_options_is_no_option() -> None:
    for end in ("", "\nAnswer with A, B or C.", "\nD is not asked for.", " Vitamin C. Why?"):
        problem = f"Which?\nA. x\nB. y{end}"
        assert kept({"problem": problem, "choices": ["x", "y"], "answer": "x"})["problem"] == problem


# ---------------------------------------------------------------- answers and questions
@pytest.mark.parametrize(
    ("answer", "gold"),
    [(["red"], "red"), ([3], "3"), ("['red']", "red"), ('["it\'s"]', "it's"), ("[1, 2]", "[1, 2]"), ("[3]", "[3]")],
)
def test_a_list_of_one_is_its_answer(answer: object, gold: str) -> None:
    assert kept({"answer": answer})["answer"] == gold


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"answer": ["red", "blue"]}, "field", "its answer is a list of 2"),
        ({"answer": []}, "empty_answer", "no answer"),
        ({"answer": ["nan"]}, "empty_answer", "its answer is 'nan'"),
        ({"answer": True}, "field", "the truth value True: write the word that the question asks for, Yes or True"),
        ({"answer": False, "choices": ["red", "blue"]}, "field", "No or False"),
        *(({"problem": problem}, "field", "asks nothing") for problem in ("nan", "NaN", " None ", "null", "N/A", "--")),
        ({"problem": ""}, "field", "problem=''"),
        ({"problem": float("nan")}, "field", "it has no problem"),
    ],
)
def test_answers_and_questions_that_are_none(row: dict[str, Any], kind: str, reason: str) -> None:
    left_out(row, kind, reason)
