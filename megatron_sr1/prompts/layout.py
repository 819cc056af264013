"""The blocks of a response, and the answer behind them: strict, in time linear in the text.

Inner texts are stripped, and a span is that of the stripped text. Between and around the parts only blanks are allowed.
Each tag of the layout stands once in the whole text. `<description>` and `<think>` break a layout that has no such tag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_sr1.prompts.answers import AnswerFormat, Found, Span, is_blank, skip_space, stripped

FAMILIAR = ("description", "think")  # tags that no layout may hold beside its own


@dataclass(frozen=True)
class Parsed:
    """A response that is its layout and nothing else. Of a block's span, `text[slice(*span)]` is its text."""

    blocks: Mapping[str, str]  # by tag
    answer: str
    spans: Mapping[str, Span]  # [start, end) of the blocks' inner texts, without the tags
    answer_span: Span  # of how it is written


@dataclass(frozen=True)
class Layout:
    """What a response is made of."""

    tags: tuple[str, ...]  # of its blocks, in order
    may_be_blank: tuple[str, ...]  # of these
    answer: AnswerFormat
    opened: bool = False  # the first tag stands in the prompt, so that the response begins inside its block

    def parse(self, text: str) -> Parsed | None:
        """Blocks and answer; None where the layout is broken in any way."""
        if not self._tags_stand_once(text):
            return None
        spans: dict[str, Span] = {}
        place = 0
        for tag in self.tags:
            inner = self._block_at(text, place, tag)
            if inner is None or (tag not in self.may_be_blank and is_blank(text, inner)):
                return None
            spans[tag] = stripped(text, inner)
            place = inner[1] + len(f"</{tag}>")
        found = self.answer.strict(text, place)
        if found is None:
            return None
        blocks = {tag: text[slice(*span)] for tag, span in spans.items()}
        return Parsed(MappingProxyType(blocks), found.answer, MappingProxyType(spans), found.span)

    def write(self, blocks: Mapping[str, str], answer: str) -> str:
        """A response in this layout, with the text of each tag; the inverse of `parse` where they are such that it has
        one."""
        parts = [("" if self._is_open(tag) else f"<{tag}>") + f" {blocks[tag]} </{tag}>" for tag in self.tags]
        return "\n".join([*parts, self.answer.write(answer)])

    def last_answer(self, text: str) -> Found | None:
        """The last answer, however broken the layout."""
        if not self.tags:
            return self.answer.last(text, 0)
        closing = f"</{self.tags[-1]}>"
        end = text.rfind(closing)
        return self.answer.last(text, None if end < 0 else end + len(closing))

    def block(self, text: str, tag: str) -> Span | None:
        """[start, end) of the one block of a tag, with its tags; None where the layout has no such tag, or the text has
        not exactly one block of it. Whatever else is broken."""
        opening, closing = f"<{tag}>", f"</{tag}>"
        is_open = self._is_open(tag)
        if tag not in self.tags or text.count(opening) != (not is_open) or text.count(closing) != 1:
            return None
        start, end = 0 if is_open else text.find(opening), text.find(closing)
        return (start, end + len(closing)) if start <= end else None

    def clean_block(self, text: str, tag: str) -> tuple[str, Span] | None:
        """The stripped inside of the one block of a tag, and the block with its tags, where no other tag is inside and
        it is not blank. Never any text from outside the block."""
        block = self.block(text, tag)
        if block is None:
            return None
        start = block[0] + (0 if self._is_open(tag) else len(f"<{tag}>"))
        inner = text[start : block[1] - len(f"</{tag}>")].strip()
        others = (other for other in self._known_tags() if other != tag)
        if not inner or any(mark in inner for other in others for mark in (f"<{other}>", f"</{other}>")):
            return None
        return inner, block

    def _is_open(self, tag: str) -> bool:
        return self.opened and tag == self.tags[0]

    def _known_tags(self) -> tuple[str, ...]:
        answer = (self.answer.name,) if self.answer.kind == "tag" else ()
        return tuple(dict.fromkeys((*self.tags, *answer, *FAMILIAR)))

    def _tags_stand_once(self, text: str) -> bool:
        for tag in self._known_tags():
            wanted = int(tag in self.tags or (self.answer.kind == "tag" and tag == self.answer.name))
            found = (text.count(f"<{tag}>"), text.count(f"</{tag}>"))
            if found != (0 if self._is_open(tag) else wanted, wanted):
                return False
        return True

    def _block_at(self, text: str, start: int, tag: str) -> Span | None:
        """The inside of the block that comes next."""
        inside = 0
        if not self._is_open(tag):
            opening = skip_space(text, start)
            if not text.startswith(f"<{tag}>", opening):
                return None
            inside = opening + len(f"<{tag}>")
        end = text.find(f"</{tag}>", inside)
        return None if end < 0 else (inside, end)
