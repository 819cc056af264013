"""What one sample is inside a shard, and the two directions between that and the project's types.

Members of the sample `key`:
    key.json        {"problem", "answer", "choices"?, "source"?, "metadata"?}, and for a demonstration also
                    {"template", "response"} and, exactly for a template that reads one, {"description"}
    key.0.png       the images in order; png, jpg, jpeg or webp

`choices` (a list of strings) becomes `metadata["choices"]`, which is `Prompt.choices`. Where the problem does not name
them, they are written into it, and the answer is their letter (see `data.choices`). `<image>` in the text of a sample
with images says where one stands (see `data.image_marks`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from megatron_sr1.data.choices import ask_with_letter
from megatron_sr1.data.image_marks import place_images
from megatron_sr1.data.json_values import as_json, load_json
from megatron_sr1.data.pictures import SHARD_FORMATS, as_seen, decode_picture, picture_size
from megatron_sr1.types import Prompt, SftSample

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
JSON_EXTENSION = "json"
MAX_JSON_BYTES = 2**24  # of a json member: a hundred books
MAX_IMAGE_BYTES = 2**28  # of a file: pixels of `pictures.MAX_PIXELS` without compression
_PROMPT_TEXTS = ("problem", "answer")
_DEMONSTRATION_TEXTS = ("template", "response")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half a character, which no tokenizer can read
_KNOWN = (*_PROMPT_TEXTS, "choices", "source", "metadata", *_DEMONSTRATION_TEXTS, "description")


def image_number(extension: str) -> int | None:
    """ "0.png" -> 0; None where the extension is not that of an image."""
    number, _, kind = extension.partition(".")
    return int(number) if kind.lower() in IMAGE_EXTENSIONS and number.isascii() and number.isdigit() else None


def size_problem(extension: str, num_bytes: int) -> str:
    """What is wrong with a member of so many bytes, "" where nothing is: whoever reads it holds it whole."""
    most = MAX_JSON_BYTES if extension == JSON_EXTENSION else MAX_IMAGE_BYTES
    if num_bytes <= most:
        return ""
    return (
        f"its member .{extension} has {num_bytes >> 20} MiB, more than {most >> 20}. Make it smaller or leave it out."
    )


# ---------------------------------------------------------------- sample -> members
def encode_sample(sample: Prompt | SftSample) -> tuple[str, dict[str, bytes]]:
    """Returns the key and the members {extension: bytes}; images as PNG.

    Raises:
        ValueError: the key cannot name a tar member, or a field breaks the schema.
        TypeError: the metadata hold what JSON cannot.
    """
    prompt = sample.prompt if isinstance(sample, SftSample) else sample
    _check_key(prompt.key)
    metadata = as_json(prompt.metadata)
    fields: dict[str, Any] = {"problem": prompt.problem, "answer": prompt.answer}
    if "choices" in metadata:
        fields["choices"] = metadata.pop("choices")
    if prompt.source:
        fields["source"] = prompt.source
    if metadata:
        fields["metadata"] = metadata
    if isinstance(sample, SftSample):
        fields |= {"template": sample.template, "response": sample.response}
        if sample.description is not None:
            fields["description"] = sample.description
    _check_fields(fields, len(prompt.images), where=f"sample {prompt.key!r}")
    members = {f"{number}.png": _encode_png(image) for number, image in enumerate(prompt.images)}
    members[JSON_EXTENSION] = encode_fields(fields)
    return prompt.key, members


def encode_fields(fields: Mapping[str, Any]) -> bytes:
    """The bytes of a json member. Raises TypeError or ValueError where JSON cannot hold a value."""
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, allow_nan=False).encode("utf-8")


def _check_key(key: str) -> None:
    parts = key.split("/")
    if not key or "." in parts[-1] or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"key {key!r} cannot name a sample: it must be a relative path without '..', and its last part must have "
            "no dot (WebDataset ends a key at the first dot). Rename the sample."
        )


def _encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    as_seen(image).save(buffer, format="PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- members -> sample
def decode_sample(key: str, text: bytes, images: Sequence[bytes], where: str) -> Prompt | SftSample:
    """Parses one sample.

    Args:
        text: the bytes of its json member.
        images: the bytes of its images, in order.
        where: shard and key, for messages.

    Raises:
        ValueError: invalid JSON, a missing, wrong or unknown field, an image that cannot be decoded.
    """
    fields = _parse_json(text, where)
    _check_fields(fields, len(images), where)
    metadata = dict(fields.get("metadata", {}))
    problem, answer = fields["problem"], fields["answer"]
    choices = tuple(fields.get("choices", ()))
    try:
        if images:
            problem, choices = place_images(problem, choices, len(images))
        if choices:
            problem, answer = ask_with_letter(problem, choices, answer, instruct="response" not in fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    if "choices" in fields:
        metadata["choices"] = choices
    prompt = Prompt(
        key=key,
        problem=problem,
        answer=answer,
        images=tuple(_decode_image(data, f"{where}, image {number}") for number, data in enumerate(images)),
        source=fields.get("source", ""),
        metadata=metadata,
    )
    if "response" not in fields:
        return prompt
    return SftSample(prompt, fields["template"], fields["response"], fields.get("description"))


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    large = size_problem(JSON_EXTENSION, len(text))
    if large:
        raise ValueError(f"{where}: {large}")
    try:
        fields = load_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: its json member is not valid JSON ({error}). Rewrite the shard.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: its json member holds a {type(fields).__name__}; it must hold an object.")
    return fields


def _decode_image(data: bytes, where: str) -> Image.Image:
    try:
        return decode_picture(data, SHARD_FORMATS)
    except ValueError as error:
        raise _undecodable(where, error) from error


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of an image, upright, in pixels; only its header is read.

    Raises:
        ValueError: it is none that `decode_sample` reads.
    """
    try:
        return picture_size(data, SHARD_FORMATS)
    except ValueError as error:
        raise _undecodable(where, error) from error


def _undecodable(where: str, error: ValueError) -> ValueError:
    return ValueError(
        f"{where}: cannot be decoded as {', '.join(SHARD_FORMATS)} ({error}). Replace the image or drop the sample."
    )


# ---------------------------------------------------------------- one set of rules for both directions
def _check_fields(fields: Mapping[str, Any], num_images: int, where: str) -> None:
    unknown = sorted(set(fields) - set(_KNOWN))
    if unknown:
        raise ValueError(
            f"{where}: unknown field {unknown[0]!r}. Known are {', '.join(_KNOWN)}; put others under metadata."
        )
    is_demonstration = not {"template", "response", "description"}.isdisjoint(fields)
    for name in _PROMPT_TEXTS + (_DEMONSTRATION_TEXTS if is_demonstration else ()):
        if name not in fields:
            raise ValueError(f"{where}: the required field {name!r} is missing. Add it to the sample's json.")
        if not isinstance(fields[name], str) or not fields[name].strip() or _SURROGATE.search(fields[name]):
            raise ValueError(f"{where}: {name}={fields[name]!r} must be a string of Unicode text that is not empty.")
    _check_type(fields, "source", str, where)
    _check_type(fields, "metadata", dict, where)
    choices = fields.get("choices", [])
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: choices={choices!r} must be a list of strings.")
    if "choices" in fields.get("metadata", {}):
        raise ValueError(f"{where}: metadata must not hold 'choices'. Make it a field of its own, beside metadata.")
    if is_demonstration:
        _check_demonstration(fields, num_images, where)


def _check_type(fields: Mapping[str, Any], name: str, kind: type, where: str) -> None:
    if name in fields and not isinstance(fields[name], kind):
        raise ValueError(f"{where}: {name}={fields[name]!r} must be a JSON {'string' if kind is str else 'object'}.")


def _check_demonstration(fields: Mapping[str, Any], num_images: int, where: str) -> None:
    """The template itself is the run's to know."""
    _check_type(fields, "description", str, where)
    if "description" in fields and num_images:
        raise ValueError(
            f"{where}: a demonstration with a description has {num_images} images; it must have none, as the "
            "description stands for them. Remove them."
        )
