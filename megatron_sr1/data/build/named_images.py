"""Images that a text names otherwise than by `<image>`.

    ![](x.png), <img ...>       where the sample has images, one of them stands there: it is `<image>`
    <image 1>, <image_1>        stays, where there are as many images
    <|vision_start|> ...        is refused: a prompt that was rendered already, whose marks would be read as text

Where the sample has no image each of them is one that is missing. In code, between backticks, they are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_sr1.data.image_marks import IMAGE_MARK

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_LINKED = re.compile(r"!\[[^\]\n]{0,300}\]\([^()\s]{1,2000}\)|<img\s[^<>]{0,2000}>", re.IGNORECASE)
_NUMBERED = re.compile(r"<\|?image[ _-]?(\d{1,3})\|?>", re.IGNORECASE)
_RENDERED = re.compile(r"<\|vision_start\|>\s*<\|(?:image|video)_pad\|>|\A\s*<\|(?:image|video)_pad\|>")


def mark_named_images(texts: Sequence[str], num_images: int) -> tuple[str, ...]:
    """The texts of a sample, its question first, with `<image>` where one of its images is linked.

    Raises:
        ValueError: they name an image that the sample does not have, or hold the marks of a chat template.
    """
    parts = [_CODE.split(text) for text in texts]  # the odd ones are code
    said = [part for text in parts for part in text[::2]]
    if rendered := _first(_RENDERED, said):
        raise ValueError(
            f"its text has {rendered!r}, a mark of chat templates: write {IMAGE_MARK} where an image stands"
        )
    numbers = [int(number) for part in said for number in _NUMBERED.findall(part)]
    named = _first(_LINKED, said) or _first(_NUMBERED, said)
    if named and not num_images:
        raise ValueError(
            f"its text names an image, {named[:80]!r}, and it has none: give it in the column images, or take it out "
            "of the text"
        )
    if numbers and not 1 <= min(numbers) <= max(numbers) <= num_images:
        raise ValueError(f"its text names the images {min(numbers)} to {max(numbers)}, and it has {num_images}")
    return tuple(
        "".join(part if index % 2 else _LINKED.sub(IMAGE_MARK, part) for index, part in enumerate(text))
        for text in parts
    )


def _first(pattern: re.Pattern[str], texts: Sequence[str]) -> str:
    return next((match[0] for match in map(pattern.search, texts) if match), "")
