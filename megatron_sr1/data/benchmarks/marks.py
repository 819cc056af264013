"""Marks like `<image 2>` in a question and its options, and the order in which its images are shown.

All images stand in front of the text: first those that the text does not mention, then the others as it mentions them.
Marks at its beginning are dropped; any other one becomes `[image n]`, with the image's place in that order. This is
what `build.samples` makes of the plain `<image>`, and it also holds for an image mentioned twice or in an option.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from megatron_sr1.data.benchmarks.item import BadRow

QUESTION_IN_IMAGE = "The image shows the question."  # what is asked where a question has no text
_MARK = re.compile(r"<image\s?(\d{1,3})>")
_LEADING = re.compile(rf"(?:\s*{_MARK.pattern})+\s*")


def mentioned(*texts: str) -> tuple[int, ...]:
    """Numbers of the images, in the order of their first marks."""
    return tuple(dict.fromkeys(int(number) for text in texts for number in _MARK.findall(text)))


def place_images(
    question: str, options: Sequence[str], images: Mapping[int, object], hidden: Collection[int] = ()
) -> tuple[str, tuple[str, ...], tuple[object, ...]]:
    """The question and the options without marks, and the images in order.

    Args:
        images: by the number of their mark.
        hidden: numbers of images that are not shown unless the question or an option mentions them.

    Raises:
        BadRow: an image is mentioned that is not there.
    """
    order = mentioned(question, *options)
    missing = [number for number in order if number not in images]
    if missing:
        raise BadRow("placeholders", f"it mentions <image {missing[0]}>, but has images {sorted(images)}")
    first = [number for number in sorted(images) if number not in order and number not in hidden]
    order = (*first, *order)
    places = {number: f"[image {place}]" for place, number in enumerate(order, 1)}

    def named(text: str) -> str:
        return _MARK.sub(lambda mark: places[int(mark[1])], text)

    return (
        named(drop_leading(question)),
        tuple(named(option) for option in options),
        tuple(images[number] for number in order),
    )


def drop_leading(question: str) -> str:
    """The question without the marks that it begins with."""
    leading = _LEADING.match(question)
    return question[leading.end() :] if leading else question


def name_parts(text: str) -> str:
    """For a set that draws all figures of a question into one image: `<image2>` becomes `[image 2]`, whatever n is."""
    return _MARK.sub(lambda mark: f"[image {mark[1]}]", text)
