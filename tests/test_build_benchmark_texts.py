"""What converters of benchmarks do with text: options in four spellings, gold letters, marks of images."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sr1.data.benchmarks.item import BadRow, answer_of, some, text
from megatron_sr1.data.benchmarks.marks import drop_leading, mentioned, name_parts, place_images
from megatron_sr1.data.benchmarks.options import (
    ANSWER_WITH_LETTER,
    ask,
    gold_letter,
    parse_options,
    split_lettered_lines,
    split_parenthesised,
)
from megatron_sr1.data.option_lists import MAX_LIST_CHARACTERS
from megatron_sr1.rewards import grade

anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
one_line = anything.map(lambda found: " ".join(found.split())).filter(bool)


# ---------------------------------------------------------------- lists
@given(st.lists(anything, max_size=12))
def test_lists_in_text_are_read_as_python_and_json_write_them(options: list[str]) -> None:
    wanted = tuple(option.strip() for option in options)
    assert parse_options(repr(options)) == wanted
    assert parse_options(json.dumps(options)) == wanted
    assert parse_options(f"\n{json.dumps(options, ensure_ascii=False)} ") == wanted
    assert parse_options(options) == wanted


@given(anything | st.binary().map(repr) | st.dictionaries(anything, anything).map(repr))
def test_other_text_is_refused_and_no_other_error_escapes(written: str) -> None:
    try:
        options = parse_options(written)
    except BadRow as bad:
        assert bad.kind == "field"
    else:
        assert all(isinstance(option, str) for option in options)


def test_nothing_in_a_list_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "run"
    for written in (
        f"[open({str(trap)!r}, 'w')]",
        f"__import__('pathlib').Path({str(trap)!r}).touch()",
        "[" * 5000,
        "-" * 50_000 + "1",
        "(" * 50_000,
        "1+" * 40_000 + "1j",
        "a." * 40_000 + "a",
        "['a'" + ", 'a'" * (MAX_LIST_CHARACTERS // 4) + "]",
        "['a', {'b'}]",
        "[['a'], 'b']",
        "[None, 'b']",
        "[True, 'b']",
        "{'a': 'b'}",
    ):
        with pytest.raises(BadRow):
            parse_options(written)
    assert not trap.exists()


def test_numbers_are_options_and_nothing_is_none() -> None:
    assert parse_options("[1, 2.50, '3 cm', -4]") == ("1", "2.5", "3 cm", "-4")
    assert parse_options("") == parse_options(None) == parse_options("[]") == parse_options([]) == ()
    assert parse_options(r"['\\frac{1}{2}', '$\\sqrt{2}$', 'caf\xe9', '½']") == (
        r"\frac{1}{2}",
        r"$\sqrt{2}$",
        "café",
        "½",
    )
    assert parse_options("['a' 'b']") == ("ab",)  # a printed numpy array, which a gold letter B will not fit


# ---------------------------------------------------------------- other spellings
@given(one_line, st.lists(one_line, min_size=2, max_size=10))
def test_what_is_asked_is_read_back(question: str, options: list[str]) -> None:
    asked = ask(question, options)
    assert asked.endswith(f"\n{ANSWER_WITH_LETTER}")
    found = split_lettered_lines(asked.removesuffix(f"\n{ANSWER_WITH_LETTER}"))
    shown = tuple("" if option == letter else option for letter, option in zip("ABCDEFGHIJ", options, strict=False))
    assert found == (question, shown) or question[:3].strip("( ")[:1] == "A"  # a question may look like an option


@pytest.mark.parametrize(
    "written, question, options",
    [
        ("Where?\n\nA. Left\nB. Right\nC. Up", "Where?", ("Left", "Right", "Up")),
        ("Size?\nChoices:\nA:40°\nB:$6$ cm\n", "Size?\nChoices:", ("40°", "$6$ cm")),
        ("Which?\r\n(A) one\r\n(B) two", "Which?", ("one", "two")),
        ("Which?\nA. B. Cooper\nB. A. Ford", "Which?", ("B. Cooper", "A. Ford")),
        ("A:1\nB:2", "", ("1", "2")),
        ("Read this:\nA: Hi.\nWhat is said?", "Read this:\nA: Hi.\nWhat is said?", ()),
        ("Which?\nA. one", "Which?\nA. one", ()),
        ("Which?\nB. one\nC. two", "Which?\nB. one\nC. two", ()),
        ("Which?\nA. one\nC. two", "Which?\nA. one\nC. two", ()),
        ("", "", ()),
    ],
)
def test_lettered_lines(written: str, question: str, options: tuple[str, ...]) -> None:
    assert split_lettered_lines(written) == (question, options)


@given(st.lists(one_line.filter(lambda option: "(" not in option), min_size=2, max_size=26))
def test_parenthesised_options(options: list[str]) -> None:
    written = " ".join(f"({letter}) {option}" for letter, option in zip(string.ascii_lowercase, options, strict=False))
    assert split_parenthesised(written) == tuple(options)


def test_parenthesised_options_with_brackets() -> None:
    ranges = "(a) (0.50, 0.60) (b) (0.0, 0.10) (c) f(x) (d) (a) again"
    assert split_parenthesised(ranges) == ("(0.50, 0.60)", "(0.0, 0.10)", "f(x)", "(a) again")
    for wrong in ("", "0.5", "(b) 1 (c) 2", "(a) alone"):
        with pytest.raises(BadRow, match="must be written"):
            split_parenthesised(wrong)


# ---------------------------------------------------------------- gold letters
@given(st.integers(2, 10), st.data())
def test_gold_letters_are_what_the_grader_accepts(num_options: int, data: st.DataObject) -> None:
    """In any spelling of either side; another letter is wrong."""
    spellings = ("{}", "({})", "{}.", "{}:", "{})", "( {} )")
    number, other = data.draw(st.lists(st.integers(0, num_options - 1), min_size=2, max_size=2, unique=True))
    letter, wrong = string.ascii_uppercase[number], string.ascii_uppercase[other]
    for spelling in spellings:
        gold = gold_letter(spelling.format(letter), num_options)
        assert gold == gold_letter(spelling.format(letter.lower()), num_options) == letter
        answer = data.draw(st.sampled_from(spellings[:3]))
        assert grade(answer.format(letter), gold) and not grade(answer.format(wrong), gold)


@pytest.mark.parametrize("answer", ["E", "e", "", "AB", "a cat", "1", "(AB)", "Yes", "A B", "(b", "Ä", "?"])
def test_what_is_no_gold_letter(answer: str) -> None:
    with pytest.raises(BadRow, match="none of its 4 options"):
        gold_letter(answer, 4)


def test_gold_with_its_text() -> None:
    assert gold_letter("(b) (0.0, 0.10)", 4) == "B" and gold_letter("C. 7\ncm", 4) == "C"


def test_drawn_options_are_lettered_once() -> None:
    assert ask("Which?", ["A", "", "c", "D"]) == f"Which?\n(A)\n(B)\n(C) c\n(D)\n{ANSWER_WITH_LETTER}"
    for options in ((), ("one",), ("x",) * 27):
        with pytest.raises(BadRow, match="from 2 to 26"):
            ask("Which?", options)


# ---------------------------------------------------------------- marks
@given(st.sets(st.integers(1, 7)), st.lists(st.integers(1, 7), max_size=8), st.lists(st.integers(1, 7), max_size=4))
def test_every_mark_names_its_own_image(there: set[int], in_question: list[int], in_options: list[int]) -> None:
    """Whatever is mentioned how often, in whatever order: [image n] is the n-th image that is shown."""
    images = {number: f"pixels {number}" for number in there}
    question = "Look: " + " and ".join(f"<image {number}>" for number in in_question)
    options = [f"it is <image {number}>!" for number in in_options]
    if not {*in_question, *in_options} <= there:
        with pytest.raises(BadRow, match="it mentions <image") as bad:
            place_images(question, options, images)
        assert bad.value.kind == "placeholders"
        return
    placed, placed_options, shown = place_images(question, options, images)
    assert sorted(shown) == sorted(images.values())
    named = [shown[int(part.split("]")[0]) - 1] for part in placed.split("[image ")[1:]]
    assert named == [images[number] for number in in_question]
    for number, option in zip(in_options, placed_options, strict=True):
        assert option == f"it is [image {shown.index(images[number]) + 1}]!"
    unmentioned = [number for number in sorted(there) if number not in (*in_question, *in_options)]
    assert list(shown[: len(unmentioned)]) == [images[number] for number in unmentioned]


def test_marks_that_lead_are_dropped_and_plain_ones_are_text() -> None:
    images = {1: "one", 2: "two"}
    assert place_images(" <image 2>\n<image 1> Compare <image 1>, <image>, <image x>.", (), images) == (
        "Compare [image 2], <image>, <image x>.",
        (),
        ("two", "one"),
    )
    assert place_images("<image 1>?", (), images, hidden=(2,)) == ("?", (), ("one",))
    assert place_images("See <image 2>.", (), images, hidden=(1, 2)) == ("See [image 1].", (), ("two",))
    assert mentioned("<image 3><image1>", "<image 3> <image 12>") == (3, 1, 12)
    assert (
        name_parts(drop_leading("<image1>\nThe ant <image1> meets <image7>.")) == "The ant [image 1] meets [image 7]."
    )


# ---------------------------------------------------------------- columns
def test_columns_are_read_by_type() -> None:
    row = {"a": " x ", "n": 7, "none": None, "list": ["x"], "flag": True, "": ""}
    assert (text(row, "a"), text(row, "n"), text(row, "none", "a")) == ("x", "7", "x")
    for name, message in (("list", "must be text"), ("flag", "must be text"), ("none", "has no none")):
        with pytest.raises(BadRow, match=message):
            text(row, name)
    assert some(row, "n", "none", "list", "") == {"n": 7, "list": ["x"]}
    for withheld in ("?", " ", None):
        with pytest.raises(BadRow, match="not published") as bad:
            answer_of({"answer": withheld}, "answer")
        assert bad.value.kind == "empty_answer"
    assert answer_of({"answer": 0}, "answer") == "0"
