"""What a prompt shows: two questions about one image show the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_BYTES = 16  # as many as tell any two images of a data set apart


def digest_of_images(images: Sequence[Image]) -> str:
    """Of sizes and pixels, in hex; of no image it is one, too."""
    digest = hashlib.blake2b(digest_size=_BYTES)
    for image in images:
        digest.update(repr(image.size).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
