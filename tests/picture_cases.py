"""Image files of every kind whose upright 8-bit picture is known."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# EXIF 2.32, tag 0x0112: which side of the picture the stored row 0 and column 0 are
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}
BLOCK = 8  # of one colour: what JPEG keeps


@dataclass(frozen=True)
class PictureFile:
    name: str
    data: bytes
    seen: np.ndarray  # [height, width, 3] uint8, upright
    tolerance: int  # in grey levels


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels that a file of an orientation holds."""
    sides = SIDES[orientation]
    pixels = upright[:, ::-1] if "right" in sides else upright
    pixels = pixels[::-1] if "bottom" in sides else pixels
    return pixels.swapaxes(0, 1) if sides[0] in ("left", "right") else pixels


def blocks(rng: np.random.Generator, width: int, height: int, *channels: int) -> np.ndarray:
    """Random colours [height, width, *channels] uint8 in blocks."""
    colours = rng.integers(0, 256, (height // BLOCK, width // BLOCK, *channels), dtype=np.uint8)
    return colours.repeat(BLOCK, 0).repeat(BLOCK, 1)


def _grey(levels: np.ndarray) -> np.ndarray:
    return np.stack([levels] * 3, axis=-1)


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


# each returns Pillow's image of the stored pixels, what is to be seen of them, and options of `Image.save`
Made = tuple[Image.Image, np.ndarray, dict[str, Any]]
Pixels = Callable[[np.random.Generator, int, int], Made]


def _rgb(rng: np.random.Generator, width: int, height: int) -> Made:
    colours = blocks(rng, width, height, 3)
    return Image.fromarray(colours), colours, {}


def _grey_8(rng: np.random.Generator, width: int, height: int) -> Made:
    levels = blocks(rng, width, height)
    return Image.fromarray(levels), _grey(levels), {}


def _rgba(rng: np.random.Generator, width: int, height: int) -> Made:
    colours, alpha = blocks(rng, width, height, 3), blocks(rng, width, height)
    return Image.fromarray(np.dstack([colours, alpha])), _on_white(colours, alpha), {}


def _grey_alpha(rng: np.random.Generator, width: int, height: int) -> Made:
    levels, alpha = blocks(rng, width, height), blocks(rng, width, height)
    return Image.fromarray(np.dstack([levels, alpha])), _on_white(_grey(levels), alpha), {}


def _palette(rng: np.random.Generator, width: int, height: int) -> Made:
    indices, palette = blocks(rng, width, height) % 4, rng.integers(0, 256, (4, 3), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    return image, palette[indices], {}


def _palette_key(rng: np.random.Generator, width: int, height: int) -> Made:
    image, seen, _ = _palette(rng, width, height)
    indices = np.asarray(image)
    return image, np.where((indices == 2)[..., None], 255, seen).astype(np.uint8), {"transparency": 2}


def _grey_key(rng: np.random.Generator, width: int, height: int) -> Made:
    levels = blocks(rng, width, height)
    key = int(levels[0, 0])
    return Image.fromarray(levels), _grey(np.where(levels == key, 255, levels)), {"transparency": key}


def _rgb_key(rng: np.random.Generator, width: int, height: int) -> Made:
    colours = blocks(rng, width, height, 3)
    key = colours[0, 0]
    here = (colours == key).all(-1, keepdims=True)
    return Image.fromarray(colours), np.where(here, 255, colours), {"transparency": tuple(map(int, key))}


def _bits_16(rng: np.random.Generator, width: int, height: int) -> Made:
    levels = blocks(rng, width, height)
    levels[0, 0] = 255  # so that all 16 bits are used
    return Image.fromarray(levels.astype(np.uint16) * np.uint16(257)), _grey(levels), {}


def _bits_12(rng: np.random.Generator, width: int, height: int) -> Made:
    levels = blocks(rng, width, height)
    levels[0, 0] = 255
    return Image.fromarray(np.rint(levels.astype(float) * 4095 / 255).astype(np.uint16)), _grey(levels), {}


def _bits_16_big_endian(rng: np.random.Generator, width: int, height: int) -> Made:
    image, seen, options = _bits_16(rng, width, height)
    return Image.frombytes("I;16B", image.size, np.asarray(image).astype(">u2").tobytes()), seen, options


def _float(rng: np.random.Generator, width: int, height: int) -> Made:
    levels = blocks(rng, width, height)
    return Image.fromarray(levels.astype(np.float32) / 255), _grey(levels), {}


def _float_range(rng: np.random.Generator, width: int, height: int) -> Made:
    """Depth, say, from -3 to 50: from black to white."""
    levels = blocks(rng, width, height)
    levels[0, 0], levels[-1, -1] = 0, 255
    return Image.fromarray(levels.astype(np.float32) / 255 * 53 - 3), _grey(levels), {}


def _cmyk(rng: np.random.Generator, width: int, height: int) -> Made:
    image = Image.fromarray(blocks(rng, width, height, 3)).convert("CMYK")
    return image, np.asarray(image.convert("RGB")), {}


def _one_bit(rng: np.random.Generator, width: int, height: int) -> Made:
    levels = (blocks(rng, width, height) > 127) * np.uint8(255)
    return Image.fromarray(levels).convert("1"), _grey(levels), {}


LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True, "exact": True},
    "JPEG": {"quality": 100, "subsampling": 0},
}
KINDS: list[tuple[Pixels, tuple[str, ...]]] = [
    (_rgb, ("PNG", "TIFF", "WEBP", "JPEG")),
    (_grey_8, ("PNG", "TIFF", "JPEG")),
    (_rgba, ("PNG", "TIFF", "WEBP")),
    (_grey_alpha, ("PNG", "TIFF")),
    (_palette, ("PNG", "TIFF")),
    (_palette_key, ("PNG",)),
    (_grey_key, ("PNG",)),
    (_rgb_key, ("PNG",)),
    (_bits_16, ("PNG", "TIFF")),
    (_bits_12, ("PNG", "TIFF")),
    (_bits_16_big_endian, ("TIFF",)),
    (_float, ("TIFF",)),
    (_float_range, ("TIFF",)),
    (_cmyk, ("TIFF", "JPEG")),
    (_one_bit, ("PNG", "TIFF")),
]


def picture_files(seed: int) -> list[PictureFile]:
    """One of each kind and format, each turned at random and of a random size."""
    rng = np.random.default_rng(seed)
    files = []
    for make, formats in KINDS:
        for format_name in formats:
            orientation = int(rng.integers(1, 9))
            width, height = (BLOCK * int(n) for n in rng.integers(4, 12, 2))
            image, seen, options = make(rng, width, height)
            exif = Image.Exif()
            exif[0x0112] = orientation
            buffer = io.BytesIO()
            image.save(buffer, format=format_name, exif=exif.tobytes(), **LOSSLESS[format_name], **options)
            # the file holds `seen` as its stored pixels; what is upright follows from the orientation
            name = f"{make.__name__[1:]}.{format_name.lower()} (orientation {orientation})"
            tolerance = 4 if format_name == "JPEG" else 1
            files.append(PictureFile(name, buffer.getvalue(), upright(seen, orientation), tolerance))
    return files


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What is seen of stored pixels: the inverse of `stored`."""
    sides = SIDES[orientation]
    pixels = pixels.swapaxes(0, 1) if sides[0] in ("left", "right") else pixels
    pixels = pixels[::-1] if "bottom" in sides else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if "right" in sides else pixels)
