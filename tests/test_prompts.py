"""The templates and the strict layouts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sr1.prompts import (
    TEMPLATES,
    extract_boxed,
    find_description,
    parse_reasoner,
    parse_see_think,
    render_caption_reasoner,
    render_cot,
    render_see_think,
)

GOOD = "<description> 3 and 7 </description> <think> 3 + 7 = 10 </think> \\boxed{10}"
HOSTILE = "{problem} {0} %s <image> <|image_pad|> <|im_end|> \\boxed{1} </description> {{}} $x"
# No tags, no braces, no backslashes; still any script and any whitespace.
plain = st.text(st.characters(exclude_characters="<>{}\\", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


# ---------------------------------------------------------------- rendering
def test_problem_text_survives_verbatim() -> None:
    for rendered in (render_see_think(HOSTILE), render_cot(HOSTILE), render_caption_reasoner("c", HOSTILE)):
        assert rendered.count(HOSTILE) == 1
    assert HOSTILE in render_caption_reasoner(HOSTILE, "q")


def test_second_pass_prompt_holds_the_description_before_the_question() -> None:
    text = render_caption_reasoner("two red dots", "How many dots?")
    assert text.index("two red dots") < text.index("How many dots?") < text.index("<think>")
    assert "<description>" not in text


@pytest.mark.parametrize("template", TEMPLATES)
def test_instruction_is_short_and_names_its_layout(template: str) -> None:
    instruction = TEMPLATES[template]
    assert len(instruction.split()) <= 45
    assert ("<description>" in instruction) == (template == "see_think")
    assert "<think>" in instruction and "</think>" in instruction and "\\boxed{}" in instruction


def test_each_renderer_ends_with_its_own_instruction() -> None:
    assert render_see_think("q").endswith(TEMPLATES["see_think"])
    assert render_cot("q").endswith(TEMPLATES["cot"])
    assert render_caption_reasoner("d", "q").endswith(TEMPLATES["caption_reasoner"])


# ---------------------------------------------------------------- the See-Think layout
def test_see_think_parts_and_spans() -> None:
    parsed = parse_see_think(GOOD)
    assert parsed is not None
    assert (parsed.description, parsed.reasoning, parsed.answer) == ("3 and 7", "3 + 7 = 10", "10")
    assert GOOD[slice(*parsed.description_span)] == "3 and 7"
    assert GOOD[slice(*parsed.reasoning_span)] == "3 + 7 = 10"
    assert GOOD[slice(*parsed.answer_span)] == "10"


@given(plain, plain, plain, st.sampled_from(["", " ", "\n\n"]), st.sampled_from(["", ".", " . ", "\n"]))
def test_see_think_round_trip(description: str, reasoning: str, answer: str, gap: str, end: str) -> None:
    text = f"{gap}<description>{description}</description>{gap}<think>{reasoning}</think>{gap}\\boxed{{{answer}}}" + end
    parsed = parse_see_think(text)
    assert parsed is not None
    assert (parsed.description, parsed.reasoning, parsed.answer) == (
        description.strip(),
        reasoning.strip(),
        answer.strip(),
    )
    for inner, span in (
        (parsed.description, parsed.description_span),
        (parsed.reasoning, parsed.reasoning_span),
        (parsed.answer, parsed.answer_span),
    ):
        assert text[slice(*span)] == inner
    assert find_description(text) == parsed.description
    assert extract_boxed(text) == parsed.answer


@given(plain, plain)
def test_reasoner_round_trip(reasoning: str, answer: str) -> None:
    text = f"<think>{reasoning}</think> \\boxed{{{answer}}}"
    parsed = parse_reasoner(text)
    assert parsed is not None and parse_see_think(text) is None
    assert text[slice(*parsed.reasoning_span)] == parsed.reasoning == reasoning.strip()
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
    assert parse_see_think(text) is not None


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
    assert parse_see_think(text) is None


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
    assert parse_reasoner(text) is None


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
    assert find_description(text) == expected


def test_defect_1_a_response_without_description_never_becomes_the_description() -> None:
    for text in ("the answer is \\boxed{10}", "<think> 3 + 7 </think> \\boxed{10}", GOOD.replace("</description>", "")):
        assert find_description(text) is None


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
    for parser in (parse_see_think, parse_reasoner, find_description, extract_boxed):
        parser(text)
    assert time.process_time() - start < 5.0  # a quadratic scan of 1e5 characters takes over half a minute
