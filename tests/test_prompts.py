"""The templates and the strict layouts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sr1.prompts import (
    CAPTION_REASONER,
    COT,
    SEE_THINK,
    THINKING,
    THINKING_COT,
    THINKING_REASONER,
    extract_boxed,
)

GOOD = "<description> 3 and 7 </description> <think> 3 + 7 = 10 </think> \\boxed{10}"
HOSTILE = "{problem} {0} %s <image> <|image_pad|> <|im_end|> \\boxed{1} </description> {{}} $x"
# No tags, no braces, no backslashes; still any script and any whitespace.
plain = st.text(st.characters(exclude_characters="<>{}\\", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


# ---------------------------------------------------------------- rendering
def test_problem_text_survives_verbatim() -> None:
    told = CAPTION_REASONER.user_text(HOSTILE, 0, "c")
    for rendered in (SEE_THINK.user_text(HOSTILE), COT.user_text(HOSTILE), told):
        assert rendered.count(HOSTILE) == 1
    assert HOSTILE in CAPTION_REASONER.user_text("q", 0, HOSTILE)


def test_second_pass_prompt_holds_the_description_before_the_question() -> None:
    text = CAPTION_REASONER.user_text("How many dots?", 0, "two red dots")
    assert text.index("two red dots") < text.index("How many dots?") < text.index("<think>")
    assert "<description>" not in text


OURS = {
    "see_think": (
        "q\n\nFirst describe everything in the image that the question needs, between <description> and "
        "</description>, without answering. Then reason between <think> and </think>. Finish with the answer alone "
        "inside \\boxed{}."
    ),
    "cot": "q\n\nLook at the image and reason between <think> and </think>. "
    "Finish with the answer alone inside \\boxed{}.",
    "cot without an image": "q\n\nReason between <think> and </think>. Finish with the answer alone inside \\boxed{}.",
    "caption_reasoner": (
        "Description of the image: d\n\nq\n\nYou cannot see the image; use its description only. "
        "Reason between <think> and </think>. Finish with the answer alone inside \\boxed{}."
    ),
    "thinking": (
        "q\n\nLook at the image and reason, without writing any of the tags below. Once your reasoning is done, "
        "describe everything in the image that the question needs, between <description> and </description>, without "
        "the answer. Finish with the answer alone inside \\boxed{}."
    ),
    "thinking_cot": "q\n\nLook at the image and reason. "
    "Finish, once your reasoning is done, with the answer alone inside \\boxed{}.",
    "thinking_cot without an image": "q\n\nReason. "
    "Finish, once your reasoning is done, with the answer alone inside \\boxed{}.",
    "thinking_reasoner": (
        "Description of the image: d\n\nq\n\nYou cannot see the image; use its description only. Reason. "
        "Finish, once your reasoning is done, with the answer alone inside \\boxed{}."
    ),
}


def test_our_prompts_are_these_to_the_byte() -> None:
    """Runs, records and checkpoints of earlier releases were made with them."""
    for number in (1, 2):
        assert SEE_THINK.user_text("q", number) == OURS["see_think"]
        assert COT.user_text("q", number) == OURS["cot"]
        assert THINKING.user_text("q", number) == OURS["thinking"]
        assert THINKING_COT.user_text("q", number) == OURS["thinking_cot"]
    assert COT.user_text("q", 0) == OURS["cot without an image"]
    assert CAPTION_REASONER.user_text("q", 0, "d") == OURS["caption_reasoner"]
    assert THINKING_COT.user_text("q", 0) == OURS["thinking_cot without an image"]
    assert THINKING_REASONER.user_text("q", 0, "d") == OURS["thinking_reasoner"]
    for template, description in ((SEE_THINK, None), (COT, None), (CAPTION_REASONER, "d")):
        turn = template.render("q", 0 if description else 1, description)
        assert (turn.before, turn.system, turn.opens) == ("", None, "")


# ---------------------------------------------------------------- the See-Think layout
def test_see_think_parts_and_spans() -> None:
    parsed = SEE_THINK.parse(GOOD)
    assert parsed is not None
    assert (parsed.blocks["description"], parsed.blocks["think"], parsed.answer) == ("3 and 7", "3 + 7 = 10", "10")
    assert GOOD[slice(*parsed.spans["description"])] == "3 and 7"
    assert GOOD[slice(*parsed.spans["think"])] == "3 + 7 = 10"
    assert GOOD[slice(*parsed.answer_span)] == "10"


@given(plain, plain, plain, st.sampled_from(["", " ", "\n\n"]), st.sampled_from(["", ".", " . ", "\n"]))
def test_see_think_round_trip(description: str, reasoning: str, answer: str, gap: str, end: str) -> None:
    text = f"{gap}<description>{description}</description>{gap}<think>{reasoning}</think>{gap}\\boxed{{{answer}}}" + end
    parsed = SEE_THINK.parse(text)
    assert parsed is not None
    assert (parsed.blocks["description"], parsed.blocks["think"], parsed.answer) == (
        description.strip(),
        reasoning.strip(),
        answer.strip(),
    )
    for inner, span in (
        (parsed.blocks["description"], parsed.spans["description"]),
        (parsed.blocks["think"], parsed.spans["think"]),
        (parsed.answer, parsed.answer_span),
    ):
        assert text[slice(*span)] == inner
    assert SEE_THINK.find_description(text) == parsed.blocks["description"]
    assert extract_boxed(text) == parsed.answer


@given(plain, plain)
def test_reasoner_round_trip(reasoning: str, answer: str) -> None:
    text = f"<think>{reasoning}</think> \\boxed{{{answer}}}"
    parsed = COT.parse(text)
    assert parsed is not None and SEE_THINK.parse(text) is None
    assert text[slice(*parsed.spans["think"])] == parsed.blocks["think"] == reasoning.strip()
    assert text[slice(*parsed.answer_span)] == parsed.answer == answer.strip()


@pytest.mark.parametrize(
    "text",
    [
        "  \n" + GOOD + " .\n",
        "<description>a</description><think></think>\\boxed{1}",
        "<description>a</description><think>so \\boxed{2}?</think>\\boxed{\\frac{1}{2}}",
        "<description>a</description><think>b</think>\\boxed{\\{1\\}}",
    ],
)
def test_see_think_accepts(text: str) -> None:
    assert SEE_THINK.parse(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "Sure! " + GOOD,
        GOOD + " Done",
        GOOD + "..",
        GOOD + " \\boxed{10}",
        GOOD + GOOD,
        GOOD.replace("<description>", "<description><description>"),
        GOOD.replace("</description>", "</description></description>"),
        GOOD.replace("3 and 7", "<think>3</think>"),
        GOOD.replace("3 and 7", "  "),
        GOOD.replace("3 and 7", ""),
        GOOD.replace("</think>", ""),
        GOOD.replace("<description>", ""),
        GOOD.replace("</description> <think>", "</description> so <think>"),
        GOOD.replace("</think> \\", "</think> it is \\"),
        GOOD.replace("\\boxed{10}", "10"),
        GOOD.replace("{10}", "{10"),
        GOOD.replace("{10}", "{10}}"),
        GOOD.replace("{10}", "{}"),
        GOOD.replace("{10}", "{ }"),
        GOOD.replace("{10}", "{\\boxed{10}}"),
        GOOD.replace("{10}", "{10\\}"),
        GOOD.replace("description", "Description"),
        "<think>a</think><description>b</description>\\boxed{1}",
        "</description>a<description><think>b</think>\\boxed{1}",
    ],
)
def test_see_think_refuses(text: str) -> None:
    assert SEE_THINK.parse(text) is None


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "\\boxed{1}",
        "<think>a</think>",
        "<think>a</think>\\boxed{}",
        "a <think>b</think>\\boxed{1}",
        "<think><think>b</think>\\boxed{1}",
        "</description><think>b</think>\\boxed{1}",
        "<think>b</think>\\boxed{1} b",
    ],
)
def test_reasoner_refuses(text: str) -> None:
    assert COT.parse(text) is None


# ---------------------------------------------------------------- the pieces
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, "3 and 7"),
        ("<description> 3 and 7 </description> <think> cut he", "3 and 7"),
        ("Well, <description>a</description>", "a"),
        ("<description>a {b} \\boxed</description>", "a {b} \\boxed"),
        ("<description> </description> <think>x</think>", None),
        ("<description> 3 and 7", None),
        ("3 and 7 </description>", None),
        ("</description> 3 <description>", None),
        ("<description>a</description><description>b</description>", None),
        ("<description>a<think>the answer is 4</think></description>", None),
    ],
)
def test_find_description(text: str, expected: str | None) -> None:
    assert SEE_THINK.find_description(text) == expected


def test_defect_1_a_response_without_description_never_becomes_the_description() -> None:
    for text in ("the answer is \\boxed{10}", "<think> 3 + 7 </think> \\boxed{10}", GOOD.replace("</description>", "")):
        assert SEE_THINK.find_description(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("} { \\boxed{3}", "3"),
        ("\\boxed{a{b}", None),
        ("\\boxed{}", ""),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


N = 100_000


@pytest.mark.parametrize(
    "text",
    [
        "<description>" * N,
        "<description>a</description>" + "<think>" * N,
        "\\boxed{" * N,
        "{" * N + "}" * N + "\\boxed{7}" + "}" * N,
        "<think>a</think>\\boxed{" + "{" * N + "}" * N + "}",
        "<think>a</think>\\boxed{" + "\\" * N + "}",
        "<description>" + " " * N + "</description>" + " " * N + "<think>" + " " * N + "</think>\\boxed{1}" + " " * N,
        "<description>a</description><think>b</think>\\boxed{1}" + " " * N + "." + " " * N + ".",
        " " * N + "x",
    ],
    ids=str.__len__,
)
def test_parsers_take_linear_time(text: str) -> None:
    start = time.process_time()
    for parser in (SEE_THINK.parse, COT.parse, SEE_THINK.find_description, SEE_THINK.answer_of):
        parser(text)
    assert time.process_time() - start < 5.0  # a quadratic scan of 1e5 characters takes over half a minute
