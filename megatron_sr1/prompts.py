r"""The instructions of both passes and the parsers of what comes back. Text only: no tokenizer, no chat template.

Layouts (Vision-SR1, released prompts):
    see_think                 <description> c </description> <think> t </think> \boxed{a}
    cot, caption_reasoner     <think> t </think> \boxed{a}

The parsers are strict and take time linear in the text. They strip the inner texts, and a span is always that of
the stripped text: `text[start:end] == inner`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sr1.types import SeeThink, Template

TEMPLATES: Mapping[Template, str] = {
    "see_think": (
        "First describe everything in the image that the question needs, between <description> and </description>, "
        "without answering. Then reason between <think> and </think>. Finish with the answer alone inside \\boxed{}."
    ),
    "cot": "Look at the image and reason between <think> and </think>. Finish with the answer alone inside \\boxed{}.",
    "caption_reasoner": (
        "You cannot see the image; use its description only. "
        "Reason between <think> and </think>. Finish with the answer alone inside \\boxed{}."
    ),
}

# `cot` without an image
TEXT_ONLY = "Reason between <think> and </think>. Finish with the answer alone inside \\boxed{}."

TAGS: Mapping[Template, tuple[str, ...]] = {  # the blocks that a template asks for
    "see_think": ("description", "think"),
    "cot": ("think",),
    "caption_reasoner": ("think",),
}

_TAGS = ("<description>", "</description>", "<think>", "</think>")
_BOX = "\\boxed{"
# A backslash takes the next character with it, so that \{ and \} are not braces.
_BRACE = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)

Span = tuple[int, int]


@dataclass(frozen=True)
class Reasoned:
    """A parsed `<think> .. </think> \\boxed{}` response; spans as in `SeeThink`."""

    reasoning: str
    answer: str
    reasoning_span: Span
    answer_span: Span


# ---------------------------------------------------------------- rendering
# User text is joined, never formatted: its braces, `<image>` and special-token literals stay as they are.
def render_see_think(problem: str) -> str:
    """The user turn of the first pass; the image goes in front of it."""
    return problem + "\n\n" + TEMPLATES["see_think"]


def render_cot(problem: str, num_images: int = 1) -> str:
    """The user turn of answer-only training (no description); images go in front of it, and if there are none it does
    not speak of one."""
    return problem + "\n\n" + (TEMPLATES["cot"] if num_images else TEXT_ONLY)


def render_caption_reasoner(description: str, problem: str) -> str:
    """The user turn of the second pass: the description stands in for the image."""
    return "Description of the image: " + description + "\n\n" + problem + "\n\n" + TEMPLATES["caption_reasoner"]


# ---------------------------------------------------------------- parsing
def parse_see_think(text: str) -> SeeThink | None:
    r"""The three parts of a response that is the See-Think layout and nothing else, or None.

    Between and around the parts only whitespace is allowed, and one final period. Each tag occurs exactly once in
    the whole text. Description and answer must not be blank; the reasoning may be.
    """
    if any(text.count(tag) != 1 for tag in _TAGS):
        return None
    description = _block(text, _skip_space(text, 0), "<description>", "</description>")
    if description is None or _is_blank(text, description):
        return None
    reasoned = _think_and_box(text, description[1] + len("</description>"))
    if reasoned is None:
        return None
    span = _strip(text, description)
    return SeeThink(
        description=text[slice(*span)],
        reasoning=reasoned.reasoning,
        answer=reasoned.answer,
        description_span=span,
        reasoning_span=reasoned.reasoning_span,
        answer_span=reasoned.answer_span,
    )


def parse_reasoner(text: str) -> Reasoned | None:
    r"""The parts of a response that is `<think> .. </think> \boxed{}` and nothing else, or None (rules as above).

    A description tag anywhere breaks this layout.
    """
    if [text.count(tag) for tag in _TAGS] != [0, 0, 1, 1]:
        return None
    return _think_and_box(text, 0)


def find_description(text: str) -> str | None:
    """What the second pass is given: the inside of the one `<description>` block, stripped.

    The rest of the layout may be broken, for example cut by the token limit. None where the block is missing, blank,
    unclosed, repeated, or has a think tag inside. Never any text from outside the block, which may hold the answer.
    """
    if text.count("<description>") != 1 or text.count("</description>") != 1:
        return None
    block = _block(text, text.find("<description>"), "<description>", "</description>")
    if block is None:
        return None
    inner = text[slice(*block)].strip()
    return inner if inner and "<think>" not in inner and "</think>" not in inner else None


def description_block(text: str) -> Span | None:
    """[start, end) of the description with its tags, under the rules of `find_description`."""
    if find_description(text) is None:
        return None
    return text.find("<description>"), text.find("</description>") + len("</description>")


def tag_block(text: str, tag: str) -> Span | None:
    """[start, end) of the one block of a tag, with its tags; None where a tag is missing, repeated or out of order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.find(opening), text.find(closing)
    return (start, end + len(closing)) if start < end else None


def extract_boxed(text: str) -> str | None:
    r"""The stripped inside of the last `\boxed{}` whose braces balance, or None. Of nested boxes, the innermost."""
    block = boxed_block(text)
    return None if block is None else text[block[0] + len(_BOX) : block[1] - 1].strip()


def boxed_block(text: str) -> Span | None:
    r"""[start, end) of the box that `extract_boxed` reads, with `\boxed{` and `}`."""
    last: Span | None = None
    open_braces: list[tuple[bool, int]] = []  # (opened by \boxed, where it begins)
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}" and open_braces:
            is_box, start = open_braces.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.end())
        elif token in ("{", _BOX):
            open_braces.append((token == _BOX, match.start()))
    return last


def _think_and_box(text: str, start: int) -> Reasoned | None:
    reasoning = _block(text, _skip_space(text, start), "<think>", "</think>")
    if reasoning is None:
        return None
    box = _skip_space(text, reasoning[1] + len("</think>"))
    if not text.startswith(_BOX, box):
        return None
    end = _closing_brace(text, box + len(_BOX))
    answer = (box + len(_BOX), -1 if end is None else end)
    if end is None or _is_blank(text, answer) or _BOX in text[slice(*answer)]:
        return None
    if text[end + 1 :].strip() not in ("", "."):
        return None
    reasoning, answer = _strip(text, reasoning), _strip(text, answer)
    return Reasoned(text[slice(*reasoning)], text[slice(*answer)], reasoning, answer)


def _block(text: str, start: int, opening: str, closing: str) -> Span | None:
    """The inside of the block that opens exactly at `start`."""
    if start < 0 or not text.startswith(opening, start):
        return None
    inside = start + len(opening)
    end = text.find(closing, inside)
    return None if end < 0 else (inside, end)


def _closing_brace(text: str, start: int) -> int | None:
    """Where the group whose inside begins at `start` is closed."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        if match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
        elif match.group() in ("{", _BOX):
            depth += 1
    return None


def _skip_space(text: str, start: int) -> int:
    return len(text) - len(text[start:].lstrip())


def _is_blank(text: str, span: Span) -> bool:
    return not text[slice(*span)].strip()


def _strip(text: str, span: Span) -> Span:
    inner = text[slice(*span)]
    start = span[0] + len(inner) - len(inner.lstrip())
    return start, start + len(inner.strip())
