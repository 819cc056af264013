"""Images as a page shows them: as the model saw them, no larger than a screen has use for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

LONGEST_SIDE = 1024  # pixels
_EXACT_PIXELS = 256 * 256  # up to here every pixel stays what it is


class ImageStore(Protocol):
    """Finds the images of a prompt and puts them into a folder."""

    def put(self, key: str, problem: str, folder: Path) -> tuple[tuple[str, ...], str]:
        """Names of the files in the folder, and where there are none, why."""
        ...


class NoImages:
    """Implements `ImageStore` where there are none to be found."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def put(self, key: str, problem: str, folder: Path) -> tuple[tuple[str, ...], str]:
        """See `ImageStore`."""
        return (), self._reason


def image_stem(*parts: str) -> str:
    """The name of a prompt's image without its ending: nothing of the key that a file system would mind."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", errors="surrogatepass")).hexdigest()[:20]


def put_images(stem: str, images: Sequence[Image.Image], folder: Path) -> tuple[str, ...]:
    """Writes RGB images, and returns their names."""
    names = []
    for number, image in enumerate(images):
        exact = image.width * image.height <= _EXACT_PIXELS
        name = f"{stem}-{number}.{'png' if exact else 'jpg'}"
        if not (folder / name).exists():
            small = image.copy()
            small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            if exact:
                small.save(folder / name, optimize=True)
            else:
                small.save(folder / name, quality=88)
        names.append(name)
    return tuple(names)
