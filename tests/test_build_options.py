"""Options as people write them: which columns hold them, what the question gets of them, what answers they allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_sr1.data.choices import ANSWER_WITH_LETTER, ask_with_letter, letter_of
from megatron_sr1.data.schema import decode_sample
from megatron_sr1.rewards import grade
from megatron_sr1.types import Prompt, SftSample
from tests.build_cases import ASKED, SEE_THINK, build, load_tool


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


OPTIONS = f"Which?\n(A) blue\n(B) red\n{ANSWER_WITH_LETTER}"


@pytest.mark.parametrize("answer", [1, 1.0, "1", "B", "b", "(B)", "B.", "(b) red", "red", "Red"])
@pytest.mark.parametrize(
    "columns",
    [
        {"choices": ["blue", "red"]},
        {"options": ["blue", "red"]},
        {"options": "['blue', 'red']"},
        {"choices": {"A": "blue", "B": "red"}},
        {"choices": {"label": ["A", "B"], "text": ["blue", "red"]}},
        {"B": "red", "A": "blue"},
        {"candidates": ["blue", "red"], "C": None},
        {"option_b": "red", "option_a": "blue", "option_c": None},
        {"optionB": "red", "optionA": "blue"},
        {"option_0": "blue", "option_1": "red"},
    ],
)
def test_options_are_written_into_the_question(
    tool: ModuleType, tmp_path: Path, columns: dict[str, Any], answer: object
) -> None:
    sample, _ = build(tool, tmp_path, {"problem": "Which?", "answer": answer, **columns})
    assert isinstance(sample, Prompt)
    assert (sample.problem, sample.answer, sample.choices) == (OPTIONS, "B", ("blue", "red"))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"answer": "green", "choices": ["blue", "red"]}, "none of its 2 options"),
        ({"answer": 2, "choices": ["blue", "red"]}, "none of its 2 options"),
        ({"answer": -1, "choices": ["blue", "red"]}, "none of its 2 options"),
        ({"answer": 1, "choices": ["1", "2", "3"]}, "can be the option A or B"),
        ({"answer": "A", "choices": ["B", "A"]}, "can be the option A or B"),
        ({"answer": "x", "choices": ["x", "x"]}, "two of its options are 'x'"),
        ({"answer": "(A) red", "choices": ["blue", "red"]}, "none of its 2 options"),
        ({"answer": "x", "choices": ["x"]}, "from 2 to 26"),
        ({"answer": "B", "options": "A. blue B. red"}, "options are no list"),
        ({"answer": "x", "choices": ["x", None]}, "option None is a NoneType"),
        ({"answer": "C", "A": "cat", "B": None, "C": "dog"}, "columns A, C, which are not all"),
        ({"answer": "C", "option_a": "cat", "option_c": "dog"}, "columns option_a, option_c, which are not all"),
        ({"answer": "1", "option_1": "cat", "option_2": "dog"}, "its answer 1 could count from 0"),
        ({"answer": "B", "choices": ["a", "b"], "options": ["b", "a"]}, "options in choices and in options"),
        ({"answer": "B", "answer_choices": ["a", "b"]}, "'answer_choices' looks like options"),
        ({"answer": "B", "Options": {"A": "a", "B": "b"}}, "'Options' looks like options"),
        ({"answer": "A", "choices": ["a", "", "c"]}, "its option B is empty"),
        ({"answer": "A", "choices": ["cat", "cat"]}, "two of its options are 'cat'"),
        ({"answer": "She has 3+4=7.\n#### 7"}, "a whole solution, with '####' in it"),
        ({"answer": "It is \\boxed{12} cm"}, "a whole solution"),
        ({"answer": "<think>x</think><answer>B</answer>"}, "a whole solution"),
    ],
)
def test_an_answer_that_can_be_read_in_two_ways_is_left_out(
    tool: ModuleType, tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    _, problem = build(tool, tmp_path, {"problem": "Which?", **row})
    assert problem["kind"] == "field" and reason in problem["reason"]


@pytest.mark.parametrize("answer", ["#### 7", "<answer>7</answer>", "\\boxed{7}", "$\\boxed{7}$"])
def test_an_answer_in_its_wrapping_is_kept(tool: ModuleType, tmp_path: Path, answer: str) -> None:
    sample, _ = build(tool, tmp_path, {"problem": "How many?", "answer": answer})
    assert isinstance(sample, Prompt) and sample.answer == answer and grade("7", answer)


def test_an_answer_may_name_the_column_of_its_option(tool: ModuleType, tmp_path: Path) -> None:
    row = {"problem": "Which?", "answer": "option_2", "option_1": "blue", "option_2": "red"}
    sample, _ = build(tool, tmp_path, row)
    assert isinstance(sample, Prompt) and (sample.problem, sample.answer) == (OPTIONS, "B")


def test_a_column_of_one_letter_alone_is_no_option(tool: ModuleType, tmp_path: Path) -> None:
    sample, _ = build(tool, tmp_path, {**ASKED, "A": 3, "X": 1, "Y": 2})
    assert isinstance(sample, Prompt) and sample.metadata == {"A": 3, "X": 1, "Y": 2}


@pytest.mark.parametrize(
    "problem",
    [
        "Which?\nA. blue\nB. red",
        "Which? (a) blue (b) red",
        "Which?\nA: blue\nB: red\nAnswer:",
        f"In the image. {ANSWER_WITH_LETTER}",
    ],
)
def test_options_that_are_there_are_not_written_again(tool: ModuleType, tmp_path: Path, problem: str) -> None:
    sample, _ = build(tool, tmp_path, {"problem": problem, "answer": "red", "choices": ["blue", "red"]})
    assert isinstance(sample, Prompt) and (sample.problem, sample.answer) == (problem, "B")


def test_shards_that_are_read_directly_have_their_options_too() -> None:
    """The same function: what the build has written stays as it is."""
    text = json.dumps({"problem": "Which?", "answer": "1", "choices": ["blue", "red"]}).encode()
    sample = decode_sample("k", text, (), "here")
    assert isinstance(sample, Prompt) and (sample.problem, sample.answer) == (OPTIONS, "B")
    again = json.dumps({"problem": sample.problem, "answer": "B", "choices": ["blue", "red"]}).encode()
    assert decode_sample("k", again, (), "here") == sample
    assert ask_with_letter(f"{ANSWER_WITH_LETTER} (A) B (B) A", ("B", "A"), "A", instruct=True)[1] == "A"
    with pytest.raises(ValueError, match="here: its answer '7' is none of its 2 options"):
        decode_sample("k", text.replace(b'"1"', b'"7"'), (), "here")
    with pytest.raises(ValueError, match="can be"):
        letter_of("0", ("1", "0"))


@pytest.mark.parametrize(
    ("choices", "answer", "wanted"),
    [
        (["A. cat", "B. dog"], "B", "Which?\n(A) cat\n(B) dog"),
        (["A、猫", "B、狗"], "B", "Which?\n(A) 猫\n(B) 狗"),
        (["(A) cat", "(B) dog"], "dog", "Which?\n(A) cat\n(B) dog"),
        (["B. dog", "A. cat"], "A", None),
        (["1. cat", "2. dog", "3. bird"], "1", None),
        (["(1) cat", "(2) dog"], "1", None),
    ],
)
def test_options_with_labels_of_their_own(
    tool: ModuleType, tmp_path: Path, choices: list[str], answer: str, wanted: str | None
) -> None:
    """Those of A, B, C ... are what the question gets; of others nobody knows whether the answer means them."""
    sample, problem = build(tool, tmp_path, {"problem": "Which?", "answer": answer, "choices": choices})
    if wanted is None:
        assert problem["kind"] == "field" and "labels of their own" in problem["reason"]
    else:
        assert isinstance(sample, Prompt)
        assert (sample.problem, sample.answer) == (f"{wanted}\n{ANSWER_WITH_LETTER}", "B")


def test_options_in_another_order_than_in_the_question_are_left_out(tool: ModuleType, tmp_path: Path) -> None:
    row = {"problem": "Which? A. 10 B. 1", "answer": 0, "choices": ["1", "10"]}
    _, problem = build(tool, tmp_path, row)
    assert problem["kind"] == "field" and "another order" in problem["reason"]


def test_demonstrations_are_not_told_to_answer_with_a_letter(tool: ModuleType, tmp_path: Path) -> None:
    row = {"problem": "Which?", "response": SEE_THINK, "choices": ["2", "3"], "image": "r.png"}
    sample, _ = build(tool, tmp_path, row)
    assert isinstance(sample, SftSample)
    assert (sample.prompt.problem, sample.prompt.answer) == ("Which?\n(A) 2\n(B) 3", "B")
