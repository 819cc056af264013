"""From a sample as it was found to the members of a shard, or to the reason why it is left out."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_sr1.data.build.named_images import mark_named_images
from megatron_sr1.data.choices import ask_with_letter
from megatron_sr1.data.image_marks import IMAGE_MARK, place_images
from megatron_sr1.data.index import content_checksum
from megatron_sr1.data.pictures import SOURCE_FORMATS, decode_picture, picture_format
from megatron_sr1.data.schema import JSON_EXTENSION, decode_sample, encode_fields, size_problem
from megatron_sr1.data.sources.source import ChangeKind, Problem, ProblemKind, RawSample
from megatron_sr1.prompts import SHIPPED
from megatron_sr1.types import MAX_ANSWER_CHARACTERS, MAX_ASPECT, TemplateName

_BLANK = " \t\r\n\u00a0\u200b\u200c\u200d\u2060\ufeff"
_SOLUTION = re.compile(r"####|\\boxed|</?(?:answer|think)>")
_FINAL_ANSWER = re.compile(r"####[^\n]+|\$?\\boxed\s?\{[^\n]*\}\$?|<answer>[^<>]*</answer>")
_NO_PROBLEMS = ("nan", "none", "null", "<na>", "n/a", "-", "--", "[]")
_NO_ANSWERS = ("", "nan", "<na>", "n/a", "-", "--", "?", "[]")  # the others are what tables write for the first
# Pillow's name of a format -> extension of the member, whose bytes stay as they are; every other one becomes PNG
_KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Question:
    """What the length of a prompt depends on."""

    problem: str
    template: TemplateName | None  # None: a prompt without a response
    description: str | None
    image_sizes: tuple[Size, ...]


class TextRules(Protocol):
    """What only other parts of the project know about texts. Goes to worker processes, so it must be picklable."""

    @property
    def max_prompt_tokens(self) -> int | None: ...

    @property
    def tokenizer(self) -> str:
        """What prompts are counted with, for people; "" where nothing counts them."""
        ...

    def prompt_tokens(self, question: Question) -> tuple[int, int] | None:
        """Tokens of the prompt where each image counts 1, and with all visual tokens; None where nothing counts them.

        Raises:
            ValueError: an image has a shape that the model's processor refuses.
        """
        ...

    def boxed_answer(self, template: TemplateName, response: str) -> str | None:
        """The answer in a response of the template's layout; None where the layout is broken."""
        ...


@dataclass(frozen=True)
class BuiltSample:
    """One sample, ready to be written."""

    where: str
    key: str
    members: tuple[tuple[str, bytes], ...]  # (extension, data): images in order, then the json
    image_sizes: tuple[Size, ...]
    text_tokens: int | None  # of the prompt; an image counts 1
    checksum: str  # `content_checksum` of the members
    content: str  # hash of what is asked, shown and answered; not of key, source and metadata
    changes: tuple[ChangeKind, ...] = ()  # what is not as it was found


class _Unfit(Exception):
    """A sample that is left out."""

    def __init__(self, kind: ProblemKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: ProblemKind = kind


def build_sample(raw: RawSample, rules: TextRules) -> BuiltSample | Problem:
    """Every image is decoded once; the json is parsed again as the reader of shards will."""
    try:
        return _build(raw, rules)
    except _Unfit as unfit:
        return Problem(raw.where, raw.key, unfit.kind, str(unfit))


def _build(raw: RawSample, rules: TextRules) -> BuiltSample:
    _check_key(raw.key)
    fields = _complete(raw.fields, rules)
    answer = fields.get("answer")
    if answer is None or (isinstance(answer, str) and answer.strip(_BLANK).casefold() in _NO_ANSWERS):
        raise _Unfit("empty_answer", "it has no answer" if not answer else f"its answer is {answer!r}")
    if isinstance(answer, str) and "response" not in fields:
        _check_gold(answer)
    problem = fields.get("problem")
    if isinstance(problem, str) and problem.strip(_BLANK).casefold() in _NO_PROBLEMS:
        raise _Unfit("field", f"its problem is {problem!r}, which asks nothing")
    changes = list(raw.changes)
    if raw.marked:
        changes += _place_images(fields, raw)
    changes += _ask_options(fields)
    try:
        text = encode_fields(fields)
        decode_sample(raw.key, text, (), where=raw.where)
    except (TypeError, ValueError) as error:
        raise _Unfit("field", str(error)) from error
    if "description" in fields and raw.images:
        name = fields.get("template")
        raise _Unfit("field", f"a {name} demonstration has {len(raw.images)} images; it must have none")
    images = [_check_image(data, number) for number, data in enumerate(raw.images)]
    sizes = tuple(size for _, _, size in images)
    members = [(f"{number}.{kind}", data) for number, (kind, data, _) in enumerate(images)]
    members.append((JSON_EXTENSION, text))
    large = next((found for kind, data in members if (found := size_problem(kind, len(data)))), "")
    if large:
        raise _Unfit("field", large)
    return BuiltSample(
        where=raw.where,
        key=raw.key,
        members=tuple(members),
        image_sizes=sizes,
        text_tokens=_text_tokens(fields, sizes, rules),
        changes=tuple(changes),
        checksum=content_checksum(dict(members)),
        content=_content_hash(fields, raw.images),
    )


def _check_gold(answer: str) -> None:
    """An answer that no response would be graded equal to is none."""
    found = _SOLUTION.search(answer)
    if found is not None and not _FINAL_ANSWER.fullmatch(answer.strip()):
        reason = f"its answer is a whole solution, with {found[0]!r} in it: give what the solution ends with"
        raise _Unfit("field", reason)
    if len(answer) > MAX_ANSWER_CHARACTERS:
        reason = f"its answer has {len(answer)} characters: no more than {MAX_ANSWER_CHARACTERS} are graded"
        raise _Unfit("field", reason)


def _check_key(key: str) -> None:
    """WebDataset ends a key at the first dot of its last part; a key must not lead out of a folder either."""
    parts = key.split("/")
    if "." in parts[-1] or any(part in ("", ".", "..") for part in parts) or not key.isprintable():
        raise _Unfit("field", f"the key {key!r} must be a relative path without '..', its last part without a dot")


def _complete(raw: Mapping[str, Any], rules: TextRules) -> dict[str, Any]:
    """Fills the template and the answer of a demonstration, and checks its layout.

    A response in the column of answers is recognised by its layout: a whole See-Think response.
    """
    fields = dict(raw)
    answer = fields.get("answer")
    if "response" not in fields and isinstance(answer, str) and rules.boxed_answer("see_think", answer) is not None:
        fields["response"] = fields.pop("answer")
    response = fields.get("response")
    if response is None:
        return fields
    name = fields.setdefault("template", "caption_reasoner" if "description" in fields else "see_think")
    template = SHIPPED.by_name.get(name) if isinstance(name, str) else None
    if not isinstance(response, str) or template is None:
        known = ", ".join(SHIPPED.by_name)
        raise _Unfit("field", f"template={name!r} and response={response!r} must be one of {known} and text")
    boxed = rules.boxed_answer(name, response)
    if boxed is None:
        repeated = bool(template.opens) and template.opens in response
        why = f", whose prompt has {template.opens} already: take it out" if repeated else ""
        raise _Unfit("response", f"the response does not follow the layout of {name}{why}: {response[:80]!r}")
    if template.reads_description != ("description" in fields):
        raise _Unfit("field", f"template={name!r}: a description belongs exactly to templates that read one")
    fields.setdefault("answer", boxed)
    return fields


def _place_images(fields: dict[str, Any], raw: RawSample) -> list[ChangeKind]:
    """Takes the marks of images out of the text and its options (see `image_marks`)."""
    problem, options = fields.get("problem"), tuple(fields.get("choices", ()))
    if not isinstance(problem, str) or not all(isinstance(option, str) for option in options):
        return []
    try:
        marked = mark_named_images((problem, *options), len(raw.images))
    except ValueError as error:
        raise _Unfit("placeholders", str(error)) from error
    changes: list[ChangeKind] = ["image_marks"] if marked != (problem, *options) else []
    problem, options = marked[0], marked[1:]
    if not any(IMAGE_MARK in text for text in marked):
        return []
    if not raw.images and raw.lacks_image:
        raise _Unfit("placeholders", f"its text has {IMAGE_MARK}, and {raw.lacks_image}")
    try:
        placed = place_images(problem, options, len(raw.images))
    except ValueError as error:
        raise _Unfit("placeholders", str(error)) from error
    if placed == (problem, options):
        return ["mark_as_text"]
    fields["problem"] = placed[0]
    if options:
        fields["choices"] = list(placed[1])
    return changes if problem.endswith(placed[0]) and placed[1] == options else ["image_marks"]


def _ask_options(fields: dict[str, Any]) -> list[ChangeKind]:
    """Writes the options into the problem, and makes the answer their letter."""
    problem, answer, options = fields.get("problem"), fields["answer"], fields.get("choices")
    if not options or not isinstance(problem, str) or not isinstance(answer, str):
        return []
    try:
        asked = ask_with_letter(problem, options, answer, instruct="response" not in fields)
    except ValueError as error:
        raise _Unfit("field", str(error)) from error
    fields["problem"], fields["answer"] = asked
    return ["options"] if asked != (problem, answer) else []


def _check_image(data: bytes, number: int) -> tuple[str, bytes, Size]:
    """Extension, bytes to store, size. Every pixel is decoded, as the reader of shards will."""
    try:
        picture = decode_picture(data, SOURCE_FORMATS)
        kept = _KEPT_FORMATS.get(picture_format(data, SOURCE_FORMATS))
    except ValueError as error:
        raise _Unfit("unreadable_image", f"image {number}: {error}") from error
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        size = f"{picture.width} x {picture.height}"
        raise _Unfit("image_size", f"image {number}: one side of {size} pixels is over {MAX_ASPECT} times the other")
    if kept is not None:
        return kept, data, picture.size
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "png", buffer.getvalue(), picture.size


def _text_tokens(fields: Mapping[str, Any], sizes: tuple[Size, ...], rules: TextRules) -> int | None:
    """As `BuiltSample.text_tokens`."""
    question = Question(fields["problem"], fields.get("template"), fields.get("description"), sizes)
    try:
        lengths = rules.prompt_tokens(question)
    except ValueError as error:
        raise _Unfit("image_size", str(error)) from error
    if lengths is None:
        return None
    (text_tokens, all_tokens), limit = lengths, rules.max_prompt_tokens
    if limit is not None and all_tokens > limit:
        visual = f"{text_tokens} and what images of {sizes} pixels add" if sizes else "text alone"
        raise _Unfit("too_long", f"its prompt has {all_tokens} tokens ({visual}); {limit} are allowed")
    return text_tokens


def _content_hash(fields: Mapping[str, Any], images: Sequence[bytes]) -> str:
    """Hex, 128 bits."""
    texts = {name: value for name, value in fields.items() if name not in ("source", "metadata")}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for image in images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]
