"""Templates of a user's own: places, random layouts, every format of an answer, and what is refused."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.config import Config, ConfigError, ObjectiveConfig, load_config
from megatron_sr1.config.templates import KEYS
from megatron_sr1.prompts import CAPTION_REASONER, COT, OURS, SEE_THINK, SHIPPED, AnswerFormat, Template, templates_of
from megatron_sr1.types import Prompt, SftSample
from tests.data_cases import picture

PUBLISHED = json.loads((Path(__file__).parent / "published_prompts.json").read_text(encoding="utf-8"))
HOSTILE = "{problem} {0} %s <image> <|image_pad|> <|im_end|> \\boxed{1} </description> {{}} $x {images} {description}"
QUESTION = "{problem}"


def template(prompt: str = QUESTION, **more: Any) -> Template:
    return Template("mine", prompt, **more)


# ---------------------------------------------------------------- rendering
def test_what_is_put_into_a_place_stays_as_it_is() -> None:
    asked = template("<{problem}> and {description}, {problem}", text_only=None)
    assert asked.user_text(HOSTILE, 0, "{problem}") == f"<{HOSTILE}> and {{problem}}, {HOSTILE}"
    turn = template("a {problem} b {images} \\boxed{answer} { problem } {}").render(HOSTILE, 2)
    assert (turn.before, turn.after) == (f"a {HOSTILE} b ", " \\boxed{answer} { problem } {}")
    assert (turn.system, turn.opens, turn.template) == (None, "", "mine")
    in_front = template("{images}{problem}").render("q", 1)
    assert (in_front.before, in_front.after) == ("", "q")


def test_without_images_their_place_is_empty_and_another_text_may_be_used() -> None:
    assert template("{problem}{images} now").user_text("q", 0) == "q now"
    plain = template("Look: {images}{problem}", text_only="Read: {problem}")
    assert plain.user_text("q", 0) == "Read: q" and plain.user_text("q", 1) == "Look: q"


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case['template']}-{case['num_images']}")
def test_published_prompts_are_what_the_released_code_makes(case: dict[str, Any]) -> None:
    """The fixtures were rendered by the files and functions of the released code, `<image>` where it puts the image."""
    turn = SHIPPED.by_name[case["template"]].render(case["problem"], case["num_images"], case["description"])
    assert turn.before + "<image>" * case["num_images"] + turn.after == case["text"]
    assert turn.system is None


def test_published_prompts_are_all_there() -> None:
    ours = {"see_think", "cot", "caption_reasoner", "thinking", "thinking_cot", "thinking_reasoner"}
    assert {case["template"] for case in PUBLISHED} == SHIPPED.by_name.keys() - ours


# ---------------------------------------------------------------- random layouts
class Written(NamedTuple):
    """A response and what it is made of."""

    template: Template
    pieces: list[tuple[str, str]]  # (tag, inside) of the blocks
    answer: str
    text: str


inner = st.text(st.characters(exclude_characters='<>{}\\"', exclude_categories=["Cs"]), min_size=1).filter(str.strip)
gaps = st.sampled_from(["", " ", "\n\n"])
TAGS = ("description", "think", "visual reasoning", "step_2", "answers", "a-b")
FORMATS = {
    "boxed": (AnswerFormat("boxed"), lambda answer: f"\\boxed{{{answer}}}"),
    "tag": (AnswerFormat("tag", "answer"), lambda answer: f"<answer>{answer}</answer>"),
    "json": (
        AnswerFormat("json", "final"),
        lambda answer: json.dumps({"why": "{", "final": answer}, ensure_ascii=False),
    ),
    "last_line": (AnswerFormat("last_line"), lambda answer: f"\n{answer}"),
}


@st.composite
def written(draw: st.DrawFn) -> Written:
    tags = tuple(draw(st.permutations(TAGS))[: draw(st.integers(1, 4))])
    kind = draw(st.sampled_from(sorted(FORMATS)))
    answer_format, write = FORMATS[kind]
    opened = draw(st.booleans())
    asked = template(
        tags=tags,
        answer=answer_format,
        describes=tags[-1] if draw(st.booleans()) else None,
        opens=f"<{tags[0]}>" if opened else "",
    )
    pieces = [(tag, draw(inner)) for tag in tags]
    one_line = "".join(
        " " if char in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\n\r" else char for char in draw(inner)
    ).strip()
    answer = "".join(char for char in one_line if char.isprintable()).strip() or "0"
    text = ""
    for number, (tag, inside) in enumerate(pieces):
        opening = "" if opened and number == 0 else f"<{tag}>"
        text += f"{draw(gaps) if opening else ''}{opening}{inside}</{tag}>"
    return Written(asked, pieces, answer, text + draw(gaps) + write(answer))


@settings(max_examples=150, deadline=None)
@given(case=written())
def test_the_parts_of_a_response_are_found_with_their_places(case: Written) -> None:
    parsed = case.template.parse(case.text)
    assert parsed is not None
    assert parsed.blocks == {tag: inside.strip() for tag, inside in case.pieces} and parsed.answer == case.answer
    for tag, span in parsed.spans.items():
        assert case.text[slice(*span)] == parsed.blocks[tag]
        block = case.template.block(case.text, tag)
        assert block is not None and block[0] <= span[0] <= span[1] < block[1]
        assert case.text[slice(*block)].endswith(f"</{tag}>")
    assert case.text[slice(*parsed.answer_span)] == parsed.answer == case.template.answer_of(case.text)
    answer = case.template.block(case.text, "answer")
    assert answer is not None and answer[0] <= parsed.answer_span[0] and parsed.answer_span[1] <= answer[1]
    described = case.template.describes
    assert case.template.find_description(case.text) == (
        None if described is None else dict(case.pieces)[described].strip()
    )


@settings(max_examples=150, deadline=None)
@given(case=written(), data=st.data())
def test_a_broken_layout_is_none(case: Written, data: st.DataObject) -> None:
    tag, _ = data.draw(st.sampled_from(case.pieces))
    opened = case.template.opens == f"<{tag}>"
    marks = [f"</{tag}>"] if opened else [f"<{tag}>", f"</{tag}>"]
    mark = data.draw(st.sampled_from(marks))
    broken = [
        case.text.replace(mark, ""),  # missing, or unclosed
        case.text.replace(mark, mark * 2),
        case.text + f"<{tag}>",
        f"<{tag}>" + case.text,  # what the chat template opened is not written again
        case.text.replace(f"<{tag}>", "\0").replace(f"</{tag}>", f"<{tag}>").replace("\0", f"</{tag}>"),
        case.text.replace(f"</{tag}>", f"</{tag}> and"),
        case.text + "\nbut",
    ]
    if len(case.pieces) > 1:
        (first, _), (second, _) = case.pieces[:2]
        swapped = case.text.replace(f"{first}>", "\0").replace(f"{second}>", f"{first}>").replace("\0", f"{second}>")
        broken.append(swapped)
    for number, text in enumerate(broken):
        if number == 6 and case.template.answer.kind == "last_line":
            continue  # with it there are two lines, see below
        assert case.template.parse(text) is None, (number, text)
    if case.template.opens:
        assert case.template.block(case.template.opens + case.text, case.pieces[0][0]) is None


def test_a_block_that_the_chat_template_opens_begins_with_the_response() -> None:
    asked = template(tags=("think", "description"), opens="<think>", describes="description", may_be_blank=("think",))
    text = "so\n</think>\n<description> two </description> \\boxed{2}"
    parsed = asked.parse(text)
    assert parsed is not None and parsed.spans["think"] == (0, 2) and asked.block(text, "think") == (0, 11)
    assert asked.find_description(text) == "two"
    assert asked.parse("</think><description>a</description>\\boxed{1}") is not None, "a blank block"
    assert asked.parse(f"<think>{text}") is None and asked.block(f"<think>{text}", "think") is None
    first = template(tags=("description",), opens="<description>", describes="description")
    assert first.find_description("two dots </description> 2") == "two dots"
    assert first.find_description("<description> two dots </description> 2") is None
    assert first.find_description("two dots <think> </description> 2") is None


def test_familiar_tags_break_layouts_without_them() -> None:
    for asked in (template(tags=("step",)), template(answer=AnswerFormat("tag", "answer"), tags=("step",))):
        good = "<step>a</step>" + ("\\boxed{1}" if asked.answer.kind == "boxed" else "<answer>1</answer>")
        assert asked.parse(good) is not None
        for mark in ("<think>", "</think>", "<description>", "</description>"):
            assert asked.parse(good.replace("a", f"a{mark}")) is None


# ---------------------------------------------------------------- answers
TAG, JSON, LINE = AnswerFormat("tag", "answer"), AnswerFormat("json", "answer"), AnswerFormat("last_line")
STRICT = [
    (TAG, "<answer> 1 </answer> \n", "1"),
    (TAG, "<answer> </answer>", None),
    (TAG, "<answer>1</answer>.", None),
    (TAG, "1 <answer>1</answer>", None),
    (TAG, "<answer>1", None),
    (TAG, "<answer>1</answer><answer>2</answer>", None),
    (TAG, "</answer>1<answer>", None),
    (JSON, '{"answer": "a b"}', "a b"),
    (JSON, '  {"x": [1, {"answer": 2}], "answer" : 10.50 }\n', "10.50"),
    (JSON, '{"answer": true}', "true"),
    (JSON, '{"answer": -1e3}', "-1e3"),
    (JSON, '{"answer": null}', None),
    (JSON, '{"answer": [1]}', None),
    (JSON, '{"answer": NaN}', None),
    (JSON, '{"answer": " "}', None),
    (JSON, '{"answer": 1, "answer": 2}', None),
    (JSON, '{"answer": 1,}', None),
    (JSON, '{"answer" 1}', None),
    (JSON, '{"other": 1}', None),
    (JSON, "{}", None),
    (JSON, '{"answer": 1} so', None),
    (JSON, '{"answer": 1}{"answer": 1}', None),
    (JSON, '{"answer": "a\nb"}', None),
    (JSON, '[{"answer": 1}]', None),
    (LINE, "\n 10 \n", "10"),
    (LINE, "  ", None),
    (LINE, "reasons\n10", "10"),
]
LAST = [
    (TAG, "<answer>1</answer> no <answer> 2 </answer>", "2"),
    (TAG, "<answer>1</answer> <answer>2", "1"),
    (TAG, "</answer> <answer>", None),
    (TAG, "\\boxed{1}", None),
    (JSON, 'so {"answer": 1} or {"answer": "2"}.', "2"),
    (JSON, '{"answer": {"a": 1}} {"answer": 3, "b": {"c": 1}} {"x": 4}', "3"),
    (JSON, '{"answer": "q\\u0041"}', "qA"),
    (JSON, '"answer": 1', None),
    (LINE, "a\nb\n\n", "b"),
    (LINE, "", None),
]


@pytest.mark.parametrize(("how", "text", "expected"), STRICT)
def test_an_answer_is_all_there_is(how: AnswerFormat, text: str, expected: str | None) -> None:
    parsed = template(answer=how).parse(text)
    assert (None if parsed is None else parsed.answer) == expected
    if parsed is not None:
        assert text[slice(*parsed.answer_span)] == expected


@pytest.mark.parametrize(("how", "text", "expected"), LAST)
def test_of_several_answers_the_last_counts(how: AnswerFormat, text: str, expected: str | None) -> None:
    assert template(answer=how).answer_of(text) == expected


def test_a_last_line_counts_behind_the_last_block() -> None:
    asked = template(tags=("think",), answer=LINE)
    assert asked.answer_of("<think>so 10\n10") is None, "what was cut while it reasoned has given no answer"
    assert asked.answer_of("<think>a</think>\nor\n10") == "10" == asked.answer_of("<think>a</think>10")
    assert asked.parse("<think>a</think>\nor\n10") is None and asked.parse("<think>a</think>\n10") is not None
    assert asked.answer_of("<think>a</think> \n") is None


N = 20_000
MARKS = (
    "<think>",
    "</think>",
    "<description>",
    "</description>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "{",
    "\n",
    '"',
)


@pytest.mark.parametrize("how", [AnswerFormat(), TAG, JSON, LINE], ids=lambda how: how.kind)
def test_time_is_linear(how: AnswerFormat) -> None:
    asked = template(tags=("description", "think"), answer=how, describes="description")
    start = time.process_time()
    texts = [mark * N for mark in MARKS] + ['{"answer":' * N, '{"a":[' * N, '{"answer": "' + " " * N, "a\n" * N]
    texts += ["<description>a</description><think>b</think>" + text for text in texts]
    for text in texts:
        assert asked.parse(text) is None or how.kind == "last_line"
        for call in (asked.answer_of, asked.find_description):
            call(text)
        for segment in ("answer", "think", "description"):
            asked.block(text, segment)
    assert time.process_time() - start < 10.0  # a quadratic scan of one of them takes longer


# ---------------------------------------------------------------- from the configuration
def made(text: str) -> Template:
    return next(reversed(templates_of(Config(templates=yaml.safe_load(text))).by_name.values()))


def test_a_template_of_ones_own() -> None:
    found = made(
        "{mine: {prompt: '{problem} {images}!', tags: [look, visual reasoning], may_be_blank: [look], "
        "answer: {tag: answer}, describes: visual reasoning, opens: <look>, "
        "system: Be brief., text_only: '{problem}?'}}"
    )
    assert found == Template(
        "mine",
        "{problem} {images}!",
        tags=("look", "visual reasoning"),
        may_be_blank=("look",),
        answer=TAG,
        describes="visual reasoning",
        opens="<look>",
        system="Be brief.",
        text_only="{problem}?",
    )


def test_what_is_extended_is_kept_where_nothing_else_is_said() -> None:
    brief = made("{brief: {extends: see_think, system: Be brief.}}")
    assert (brief.prompt, brief.tags, brief.describes) == (SEE_THINK.prompt, SEE_THINK.tags, "description")
    assert brief.system == "Be brief." and brief.name == "brief" and brief.digest != SEE_THINK.digest
    words = made("{words: {extends: cot, prompt: '{problem} Think.'}}")
    assert words.text_only is None and words.tags == COT.tags, "its parent's text without images is of other words"
    tags = made("{tags: {extends: see_think, tags: [think, description]}}")
    assert tags.describes == "description" and tags.may_be_blank == ("think",)
    look = "look: {extends: see_think, tags: [look, think], describes: look}"
    assert made(f"{{{look}, more: {{extends: look, tags: [think, look]}}}}").describes == "look"
    assert made(f"{{{look}, other: {{extends: look, tags: [think]}}}}").describes is None
    assert made("{plain: {extends: see_think, describes: null}}").describes is None
    later = made("{b: {extends: a, answer: {json: final}}, a: {extends: see_think, answer: last_line, opens: null}}")
    assert later.name == "b" or later.name == "a"
    both = templates_of(load_config(None, ["templates={b: {extends: a}, a: {extends: cot, answer: {json: final}}}"]))
    assert both.by_name["b"].answer == AnswerFormat("json", "final") == both.by_name["a"].answer


def test_the_digest_is_of_everything_but_the_name() -> None:
    fields = {"prompt": "{problem}", "tags": ("a", "b")}
    first = Template("x", **fields)
    others = (
        Template("x", **fields | {"prompt": "{problem} "}),
        *(Template("x", **fields, **more) for more in ({"system": "s"}, {"opens": "<a>"}, {"answer": LINE})),
        *(Template("x", **fields, **more) for more in ({"may_be_blank": ("a",)}, {"describes": "a"})),
        Template("x", **fields, text_only="{problem}!"),
    )
    assert Template("y", **fields).digest == first.digest
    digests = [each.digest for each in (first, *others)]
    assert len(set(digests)) == len(digests)


REFUSED = [
    ("{1: {prompt: x}}", r"templates=1.*names of letters"),
    ("{a b: {prompt: x}}", r"templates='a b'.*names of letters"),
    ("{a: text}", r"templates.a='text'.*keys with values"),
    ("{a: {}}", r"templates.a=.*keys with values"),
    ("{a: {promt: x}}", r"templates.a.promt is no key of a template. Did you mean 'prompt'"),
    ("{a: {prompt: true}}", r"templates.a.prompt=True.*a text"),
    ("{a: {prompt: 3}}", r"templates.a.prompt=3.*a text"),
    ("{a: {prompt: null}}", r"templates.a.prompt=None.*a text"),
    ("{a: {prompt: ' '}}", r"templates.a.prompt=' '.*a text"),
    ("{a: {extends: cot, tags: think}}", r"templates.a.tags='think'.*a list of tags"),
    ("{a: {extends: cot, tags: [1]}}", r"templates.a.tags=\[1\].*a list of tags"),
    ("{a: {extends: cot, answer: box}}", r"templates.a.answer='box'.*boxed, last_line"),
    ("{a: {extends: cot, answer: {tag: a, json: b}}}", r"templates.a.answer=.*boxed, last_line"),
    ("{a: {extends: cot, answer: {tag: true}}}", r"templates.a.answer=.*boxed, last_line"),
    ("{a: {extends: cot, system: ' '}}", r"templates.a.system=' '.*a text"),
    ("{cot: {extends: see_think}}", r"templates='cot'.*another name than the shipped.*extends: cot"),
    ("{a: {tags: [think]}}", r"templates.a=.*keys with a prompt"),
    ("{a: {extends: nope}}", r"templates.a.extends='nope' is no template"),
    ("{a: {extends: see_thnk}}", r"Did you mean 'see_think'"),
    ("{a: {extends: a}}", r"templates.a.extends: a -> a is a circle"),
    ("{a: {extends: b}, b: {extends: a}}", r"templates.b.extends: a -> b -> a is a circle"),
    ("{a: {prompt: 'x'}}", r"templates.a.prompt='x'.*with the place \{problem\}"),
    ("{a: {prompt: '{question}'}}", r"templates.a.prompt: \{question\} is no place.*\{images\}, \{problem\}"),
    (r"{a: {prompt: '\boxed{problem}'}}", r"templates.a.prompt: \{problem\} is text in .*behind a command"),
    (r"{a: {prompt: '{problem} \boxed{}{images}'}}", r"templates.a.prompt: \{images\} is text"),
    ("{a: {prompt: '{problem}{images}{images}'}}", r"templates.a.prompt=.*\{images\} at most once"),
    ("{a: {prompt: '{problem}{description}{images}'}}", r"templates.a.prompt=.*not beside \{description\}"),
    ("{a: {extends: cot, text_only: x}}", r"templates.a.text_only='x'.*places of the prompt"),
    ("{a: {extends: cot, text_only: '{problem}{images}'}}", r"templates.a.text_only=.*without \{images\}"),
    ("{a: {extends: cot, tags: ['<think>']}}", r"templates.a.tags='<think>'.*without brackets"),
    ("{a: {extends: cot, tags: ['a/b']}}", r"templates.a.tags='a/b'"),
    ("{a: {extends: cot, tags: [think, think]}}", r"templates.a.tags=\('think', 'think'\).*tags that differ"),
    ("{a: {extends: cot, may_be_blank: [look]}}", r"templates.a.may_be_blank=.*some of think"),
    ("{a: {extends: cot, describes: look}}", r"templates.a.describes='look'.*one of the template's tags, think"),
    ("{a: {extends: see_think, may_be_blank: [description]}}", r"templates.a.may_be_blank=.*without 'description'"),
    ("{a: {extends: see_think, opens: <think>}}", r"templates.a.opens='<think>'.*the first tag, <description>"),
    ("{a: {prompt: '{problem}', opens: <think>}}", r"templates.a.opens='<think>'.*there are no tags"),
    ("{a: {extends: cot, answer: {tag: think}}}", r"templates.a.answer.tag='think'.*another tag than think"),
    ("{a: {extends: cot, answer: {tag: <a>}}}", r"templates.a.answer.tag='<a>'.*without brackets"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_a_template_that_cannot_be_is_refused_by_its_key(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(text)


def test_every_key_is_refused_where_it_is_of_another_type() -> None:
    for key, value in itertools.product(KEYS, (True, [[1]], 3)):
        with pytest.raises(ConfigError, match=rf"templates.a.{key}="):
            Config(templates={"a": {"extends": "cot", **{key: value}}})


ROLES = [
    ("template=nope", r"objective.template='nope' is no template"),
    (
        "template=caption_reasoner",
        r"objective.template='caption_reasoner'.*without \{description\}, one of see_think, cot",
    ),
    ("second_template=cot", r"objective.second_template='cot'.*one of caption_reasoner, vision_sr1_reasoner"),
    ("second_template=vision_sr1_reasonr", r"Did you mean 'vision_sr1_reasoner'"),
    ("plain_template=see_think", r"objective.plain_template='see_think'.*asks for no description"),
    ("plain_template=caption_reasoner", r"objective.plain_template='caption_reasoner'.*without \{description\}"),
]


@pytest.mark.parametrize(("word", "words"), ROLES)
def test_a_template_must_be_one_of_its_pass(word: str, words: str) -> None:
    from megatron_sr1.streams import preset_of

    key, _, name = word.partition("=")
    with pytest.raises(ConfigError, match=words):
        preset_of(Config(objective=ObjectiveConfig(**{key: name})))


# ---------------------------------------------------------------- demonstrations
THINKS = {"thinks": {"extends": "cot", "opens": "<think>"}}
DEMONSTRATIONS = [
    (SftSample(Prompt("k1", "q", "1"), "nope", "r"), r"sample 'k1': template='nope' is no template"),
    (SftSample(Prompt("k2", "q", "1"), "caption_reasoner", "r"), r"sample 'k2': .*lacks a description"),
    (SftSample(Prompt("k3", "q", "1"), "see_think", "r", "d"), r"sample 'k3': .*has a description"),
    (SftSample(Prompt("k4", "q", "1", (picture(0),)), "caption_reasoner", "r", "d"), r"sample 'k4': .*1 images"),
    (
        SftSample(Prompt("k5", "q", "1"), "thinks", "<think> a </think> \\boxed{1}"),
        r"sample 'k5': .*has <think>, which",
    ),
]


@pytest.mark.parametrize(("sample", "words"), DEMONSTRATIONS)
def test_a_demonstration_that_its_template_cannot_ask_is_named(sample: SftSample, words: str) -> None:
    templates = templates_of(Config(templates=THINKS))
    with pytest.raises(ValueError, match=words):
        templates.of_demonstration(sample)


def test_demonstrations_of_known_templates_pass() -> None:
    templates = templates_of(Config(templates=THINKS))
    for name, response, description in (("thinks", "a </think>", None), ("vision_sr1", "r", None)):
        assert templates.of_demonstration(SftSample(Prompt("k", "q", "1"), name, response, description)).name == name
    told = SftSample(Prompt("k", "q", "1"), "vision_sr1_reasoner", "r", "d")
    assert templates.of_demonstration(told).user_text("q", 0, "d").startswith("Text description: d\nQuestion: q\n")
    assert OURS.second is CAPTION_REASONER
