"""`<image>` in a question: where one of its images stands.

All images stand in front of the text, so marks that all stand at its beginning are dropped. Where one stands inside the
text, the n-th one becomes `[image n]`, the first ones too, which keeps what the text refers to. Without images
`<image>` is text like any other, but not where it begins a line of its own: that is a question whose image is missing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

IMAGE_MARK = "<image>"
_LEADING = re.compile(r"(?:\s*<image>)+\s*")
_OWN_LINE = re.compile(r"\s*(?:<image>\s*)+\n\s*\S")


def place_images(problem: str, options: Sequence[str], num_images: int) -> tuple[str, tuple[str, ...]]:
    """The question and its options without marks; what comes out stays as it is when it goes in again.

    Raises:
        ValueError: there are more marks than images, or fewer.
    """
    texts = (problem, *options)
    num_marks = sum(text.count(IMAGE_MARK) for text in texts)
    if not num_marks or (not num_images and not _OWN_LINE.match(problem)):
        return problem, tuple(options)
    if num_marks != num_images:
        raise ValueError(f"{num_marks} times {IMAGE_MARK} in the text, but {num_images} images")
    leading = _LEADING.match(problem)
    if leading is not None and leading.group().count(IMAGE_MARK) == num_marks:
        return problem[leading.end() :], tuple(options)
    numbers = itertools.count(1)
    placed = [re.sub(IMAGE_MARK, lambda _: f"[image {next(numbers)}]", text) for text in texts]
    return placed[0], tuple(placed[1:])
