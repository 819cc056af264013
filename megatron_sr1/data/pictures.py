"""From the bytes of an image file to the picture the model sees: the one place for builder, stream and what follows.

    orientation      the turn that EXIF or XMP asks for is made, and the mark goes
    transparency     on white
    16 bit, float    grey: scaled to 8 bit by their range, see `_eight_bit`; colours: by their high byte, and refused
                     where that is not their range, see `_check_reach`
    other modes      palette, CMYK, grey and so on: as Pillow converts them; of an animation, the first frame

The result is plain 8-bit RGB without metadata, so that nothing can turn or blend it a second time.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

SHARD_FORMATS = ("PNG", "JPEG", "WEBP")  # of a shard's images; no other decoder of Pillow is ever tried there
SOURCE_FORMATS = (*SHARD_FORMATS, "GIF", "BMP", "TIFF", "PPM")  # what shards are built from
# what Pillow's decoders raise on damaged or hostile files
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.32, tag 0x0112: what brings the picture upright
_SIDEWAYS = (5, 6, 7, 8)
_PNG_MARKS = (b"eXIf", b"iTXt", b"Raw profile type")  # chunks of a PNG without which it has no orientation
_BLOCK_BYTES = 4 << 20  # of memory, at most: a larger picture has several
_KEPT_BLOCKS = 64  # 256 MiB at most, as much as is read ahead unless told otherwise
_DECODED_AT_ONCE = 1 << 20  # bytes of a file
_WHITE = ((255, 255),) * 3  # least and most of each colour
_PNG_BITS = 24  # where its header has the bits of a value
_LEAST_REACH = 2**14  # of 16-bit colours; below, the file holds values of fewer bits
MAX_PIXELS = 2**26  # of a file: 8192 x 8192; Pillow needs 4 bytes for each, and a second picture to convert it
_DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners give, whatever holds them


# the memory of a picture goes to a later one, rather than to the system, which has to clear every page of it again:
# of pictures that are let go a batch at a time that is a fifth of the decoding. Pillow's docs: Block Allocator
Image.core.set_block_size(_BLOCK_BYTES)
Image.core.set_blocks_max(_KEPT_BLOCKS)
Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS  # Pillow warns from here on; `_opened` refuses before
# a decoding thread takes the interpreter's lock after each piece of a file, and others hold it meanwhile
ImageFile.MAXBLOCK = _DECODED_AT_ONCE


def decode_picture(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """The picture in a file: RGB, 8 bit, upright.

    Raises:
        ValueError: it is damaged, of none of `formats`, of more than MAX_PIXELS, transparent everywhere, or its values
            have no range that could be scaled.
    """
    with _opened(data, formats) as image:
        is_wide = _has_wide_colours(image, data)
        image.load()
        if is_wide:
            _check_reach(image)
        if image.format == "PNG" and "transparency" in image.info:
            _scale_key(image, bits=data[_PNG_BITS])
        return as_seen(image, _orientation(image, data))


def picture_size(data: bytes, formats: tuple[str, ...]) -> tuple[int, int]:
    """Width and height in pixels of what `decode_picture` returns; of the formats of shards, only headers are read.

    Raises:
        ValueError: see `decode_picture`.
    """
    with _opened(data, formats) as image:
        width, height = image.size
        return (height, width) if _orientation(image, data) in _SIDEWAYS else (width, height)


def picture_format(data: bytes, formats: tuple[str, ...]) -> str:
    """Pillow's name of the file's format. Raises as `decode_picture`."""
    with _opened(data, formats) as image:
        return str(image.format)


@contextmanager
def _opened(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Pillow's words for what goes wrong, less the address in memory that it names where it knows no format: no two
    would be the same."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size  # of its header: nothing is decoded yet
            if width * height > MAX_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS}: make it smaller")
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(formats)}") from error
    except _DECODER_ERRORS as error:
        raise ValueError(str(error)) from error


def as_seen(image: Image.Image, orientation: int = 1) -> Image.Image:
    """Any picture of Pillow's as the model sees it: a new one, RGB, 8 bit, without metadata.

    Args:
        orientation: its EXIF orientation; 1 is upright.

    Raises:
        ValueError: it is transparent everywhere, its values have no range that could be scaled, or Pillow cannot
            convert its mode.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    elif image.has_transparency_data:
        colours = image.convert("RGBA")
        if colours.getchannel("A").getextrema() == (0, 0):
            raise ValueError("it is transparent everywhere: there is nothing to see")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
        if image.convert("RGB").getextrema() == _WHITE:
            raise ValueError("it is white on transparency: on white there is nothing to see")
    seen = image.convert("RGB")
    if orientation in _UPRIGHT:
        seen = seen.transpose(_UPRIGHT[orientation])
    seen.info.clear()
    return seen


def _has_wide_colours(image: Image.Image, data: bytes) -> bool:
    """Whether colours are stored in 16 bit each, of which Pillow keeps the high byte; it says so nowhere. Before it
    loads the image."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8
    if isinstance(image, ImageFile.ImageFile) and image.format == "PPM":
        return any(tile.args[-1:] == (2**16 - 1,) for tile in image.tile if isinstance(tile.args, tuple))
    return image.format == "PNG" and data[_PNG_BITS] == 16


def _check_reach(image: Image.Image) -> None:
    """Raises ValueError where 16-bit colours are all so low that they are values of 8 to 14 bit, as cameras give: they
    would be seen nearly black, and what would tell them apart is gone."""
    bands = ["L"] if image.mode == "LA" else ["R", "G", "B"]
    highest = max(int(image.getchannel(band).getextrema()[1]) for band in bands)  # pyright: ignore[reportArgumentType]
    if highest < _LEAST_REACH >> 8:
        raise ValueError(
            f"its colours of 16 bit stay below {(highest + 1) << 8} of 65535, and would be seen nearly black: scale "
            "them to 8 bit by their range"
        )


def _scale_key(image: Image.Image, bits: int) -> None:
    """Pillow scales the values of a PNG to 8 bit, but not the one that is transparent (tRNS; PNG, section 11.3.2.1)."""
    key = image.info["transparency"]
    if image.mode == "L" and bits < 8:
        image.info["transparency"] = key * 255 // (2**bits - 1)
    elif image.mode == "RGB" and bits > 8:
        image.info["transparency"] = tuple(value >> (bits - 8) for value in key)


def _orientation(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG" and not any(mark in data for mark in _PNG_MARKS):
        return 1  # Pillow would decode every pixel to look for a mark behind them
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*_DECODER_ERRORS, KeyError, TypeError, struct.error):
        return 1  # the EXIF data are damaged, not the picture
    return int(orientation) if orientation in _UPRIGHT else 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bit, scaled:

    integers 0 ... 65535    white is the highest value of the smallest depth of 8, 10, 12, 14, 16 bit that holds all
    floats 0 ... 1          white is 1
    anything else           from the lowest value (black) to the highest (white)
    """
    stored = np.asarray(image)
    values = stored.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(f"its values are not all finite (mode {image.mode})")
    if stored.dtype.kind != "f" and low >= 0 and high < 2 ** _DEPTHS[-1]:
        black, white = 0.0, min(2.0**bits - 1 for bits in _DEPTHS if high < 2**bits)
    elif stored.dtype.kind == "f" and low >= 0 and high <= 1:
        black, white = 0.0, 1.0
    elif low < high:
        black, white = low, high
    else:
        raise ValueError(f"all its values are {low:g} (mode {image.mode}), which have no range to scale to 8 bit by")
    grey = (values - black) / (white - black)
    if (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    ):
        grey = 1.0 - grey  # white is 0, which Pillow minds at 8 bit alone
    if "transparency" in image.info:
        grey[stored == image.info["transparency"]] = 1.0
    return Image.fromarray(np.rint(grey * 255.0).astype(np.uint8))
