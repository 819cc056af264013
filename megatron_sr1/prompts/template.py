r"""What a policy is asked, and what its response is made of. Text only: no tokenizer, no chat template.

A prompt is text with places for what it is about: {images} {problem} {description}. What is put into a place is joined,
never formatted: its braces, `<image>` and special-token literals stay as they are. Braces behind a command, as in
\boxed{answer}, are text.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from megatron_sr1.config.rules import ConfigError, require
from megatron_sr1.prompts.answers import BOXED, AnswerFormat, Span
from megatron_sr1.prompts.layout import Layout, Parsed
from megatron_sr1.types import TemplateName, Turn

Place = Literal["images", "problem", "description"]
ANSWER = "answer"  # the segment of the answer; all others are tags
_PLACE = re.compile(r"(\\[A-Za-z]+(?:\{[^{}]*\})+)|\{(\w+)\}")
_TAG = re.compile(r"[A-Za-z](?:[\w -]*\w)?", re.ASCII)
_TAG_RULE = "words of letters, digits, _ and -, without brackets"


@dataclass(frozen=True)
class Template:
    """One way to ask, with the layout of the responses to it.

    Raises:
        ConfigError: a place or a tag that cannot be, or settings that contradict each other; the message names the key
            of the configuration's section `templates`.
    """

    name: TemplateName
    prompt: str  # the user's turn; without {images} they stand in front
    tags: tuple[str, ...] = ()  # of the blocks of a response, in order; the answer comes behind them
    may_be_blank: tuple[str, ...] = ()  # of these
    answer: AnswerFormat = BOXED
    describes: str | None = None  # the tag whose block the second pass is given in place of the images
    text_only: str | None = None  # the user's turn where there are no images; None: the same
    system: str | None = None  # the system prompt; None: the model's, where it has one
    opens: str = ""  # the tag of the first block, where the chat template writes it into the prompt: <think>

    def __post_init__(self) -> None:
        self._check_tags()
        self._check_answer()
        places = self._places("prompt", self.prompt)
        require(
            "problem" in places,
            self._key("prompt"),
            self.prompt,
            "a text with the place {problem}",
            "Put it where the question belongs.",
        )
        require(
            places.count("images") <= 1 and not ("images" in places and "description" in places),
            self._key("prompt"),
            self.prompt,
            "a text with {images} at most once, and not beside {description}, which stands in for them",
            "Take it out; without it images stand in front.",
        )
        if self.text_only is not None:
            without = self._places("text_only", self.text_only)
            require(
                set(without) == set(places) - {"images"},
                self._key("text_only"),
                self.text_only,
                "a text with the places of the prompt, but without {images}",
                "It is the prompt where there are none.",
            )
        if self.system is not None:
            require(
                bool(self.system.strip()), self._key("system"), self.system, "a text", "null: the model's own, or none."
            )

    @property
    def reads_description(self) -> bool:
        """Whether a prompt is made of a description, so that images are not shown."""
        return "description" in self._places("prompt", self.prompt)

    @cached_property
    def layout(self) -> Layout:
        """Of the responses."""
        return Layout(self.tags, self.may_be_blank, self.answer, opened=bool(self.opens))

    @cached_property
    def digest(self) -> str:
        """16 hex digits of everything but the name."""
        text = json.dumps(asdict(replace(self, name="")), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # ------------------------------------------------------------ rendering
    def render(self, problem: str, num_images: int = 1, description: str | None = None) -> Turn:
        """The turn of one question."""
        assert (description is not None) == self.reads_description, self.name
        text = self.prompt if num_images or self.text_only is None else self.text_only
        values = {"problem": problem, "description": description}
        before, after = "", ""
        for literal, place in _pieces(text):
            after += literal
            if place == "images":
                before, after = after, ""
            elif place:
                value = values[place]
                assert value is not None, place
                after += value
        return Turn(after, before, self.system, self.opens, self.name)

    def user_text(self, problem: str, num_images: int = 1, description: str | None = None) -> str:
        """The text of that turn, without images."""
        turn = self.render(problem, num_images, description)
        return turn.before + turn.after

    def as_question(self, problem: str, description: str | None) -> str:
        """For a reader behind an endpoint, who gets one text: the template's own system prompt is in front."""
        text = self.user_text(problem, 0, description)
        return text if self.system is None else f"{self.system}\n\n{text}"

    # ------------------------------------------------------------ what comes back
    def behind_opening(self, text: str) -> str:
        """A response of a model behind an endpoint as one of the policy is: what comes behind `opens`. Another model's
        chat template may leave the tag to the model."""
        start = text.lstrip()
        return start.removeprefix(self.opens) if self.opens and start.startswith(self.opens) else text

    def parse(self, text: str) -> Parsed | None:
        """The parts of a response that is the layout and nothing else, or None."""
        return self.layout.parse(text)

    def answer_of(self, text: str) -> str | None:
        """The last answer in a response, however broken its layout; "" where it is blank, None where there is none."""
        found = self.layout.last_answer(text)
        return None if found is None else found.answer

    def find_description(self, text: str) -> str | None:
        """What the second pass is given: the inside of the one block that describes, stripped.

        The rest of the layout may be broken, for example cut by the token limit. None where the block is missing,
        blank, unclosed, repeated, or has another tag inside. Never any text from outside the block, which may hold the
        answer.
        """
        found = None if self.describes is None else self.layout.clean_block(text, self.describes)
        return None if found is None else found[0]

    def block(self, text: str, segment: str) -> Span | None:
        """[start, end) of a tag's block, or of the last answer, with its tags or braces; None where the response has
        none. The block that describes is one only under the rules of `find_description`."""
        if segment == ANSWER:
            found = self.layout.last_answer(text)
            return None if found is None else found.block
        if segment == self.describes:
            clean = self.layout.clean_block(text, segment)
            return None if clean is None else clean[1]
        return self.layout.block(text, segment)

    # ------------------------------------------------------------ checks
    def _key(self, field: str) -> str:
        return f"templates.{self.name}.{field}"

    def _check_tags(self) -> None:
        for tag in self.tags:
            require(_TAG.fullmatch(tag) is not None, self._key("tags"), tag, _TAG_RULE, "Write think for <think>.")
        require(
            len(set(self.tags)) == len(self.tags),
            self._key("tags"),
            self.tags,
            "tags that differ",
            "A block stands once in a response.",
        )
        require(
            set(self.may_be_blank) <= set(self.tags),
            self._key("may_be_blank"),
            self.may_be_blank,
            f"some of {', '.join(self.tags) or 'no tags'}",
            "Name them in tags, too.",
        )
        require(
            self.describes is None or self.describes in self.tags,
            self._key("describes"),
            self.describes,
            f"one of the template's tags, {', '.join(self.tags) or 'of which there are none'}, or null",
            "Name it in tags, too.",
        )
        require(
            self.describes not in self.may_be_blank,
            self._key("may_be_blank"),
            self.may_be_blank,
            f"without {self.describes!r}, which a second pass is given",
            "Take it out.",
        )
        first = f"<{self.tags[0]}>" if self.tags else "that of a block, and there are no tags"
        require(
            self.opens in ("", first),
            self._key("opens"),
            self.opens,
            f"the first tag, {first}, or empty",
            "It is what the model's chat template writes of the answer.",
        )

    def _check_answer(self) -> None:
        answer = self.answer
        if answer.kind != "tag":
            return
        require(
            _TAG.fullmatch(answer.name) is not None, self._key("answer.tag"), answer.name, _TAG_RULE, "Write answer."
        )
        require(
            answer.name not in self.tags,
            self._key("answer.tag"),
            answer.name,
            f"another tag than {', '.join(self.tags)}",
            "Leave it out of tags: the answer comes behind them.",
        )

    def _places(self, field: str, text: str) -> list[str]:
        """Of a text, in order. Raises ConfigError for one that is unknown, or is text because it stands behind a
        command."""
        places = [place for _, place in _pieces(text) if place]
        unknown = [place for place in places if place not in get_args(Place)]
        if unknown:
            raise ConfigError(
                f"{self._key(field)}: {{{unknown[0]}}} is no place. Known are {{images}}, {{problem}} and "
                "{description}. Where braces are meant, put a blank inside them."
            )
        for match in _PLACE.finditer(text):
            hidden = [place for place in get_args(Place) if match[1] and f"{{{place}}}" in match[1]]
            if hidden:
                raise ConfigError(
                    f"{self._key(field)}: {{{hidden[0]}}} is text in {match[1]!r}, as braces behind a command are. Put "
                    "a blank in front of it."
                )
        return places


def _pieces(text: str) -> list[tuple[str, str]]:
    """(text, place behind it) of a prompt; the last place is ""."""
    pieces: list[tuple[str, str]] = []
    start = 0
    for match in _PLACE.finditer(text):
        if match[2] is not None:
            pieces.append((text[start : match.start()], match[2]))
            start = match.end()
    return [*pieces, (text[start:], "")]
