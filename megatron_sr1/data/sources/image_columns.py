"""Columns that look like images under a name that is not asked for: a sample must not lose its images in silence."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from megatron_sr1.data.sources.source import BASE64_HEADS

# image_path, img, image_file, image_url, image_0, second_image, photos ...; not image_id, image_width
_FURTHER = r"(?:first|second|third|fourth|last|1st|2nd|3rd|other|another|extra|left|right|before|after)[ _-]"
_IMAGE_NAME = re.compile(
    rf"(?:{_FURTHER}?)?(?:image|img|picture|pic|photo)s?[ _-]?"
    r"(?:(?:file[ _-]?)?(?:path|file|name|url|uri|link|bytes|data|base64|b64)s?)?[ _-]?\d*",
    re.IGNORECASE,
)
_NUMBERED = re.compile(rf".*\d|{_FURTHER}.*", re.DOTALL | re.IGNORECASE)
_PIXEL_NAME = re.compile(
    r"(?:(?:image|img|picture|pic|photo)s?[ _-]?(?:rgba?|bgr|gr[ae]y|arrays?|arr|tensors?|np|numpy|pixels?|values?)"
    r"|pixel[ _-]?values?|pixels)",
    re.IGNORECASE,
)
_LEAST_SIDE = 8  # of an array that is taken for a picture whatever it is called
_MIN_BASE64 = 64  # characters
_OTHER_MEDIA = re.compile(r"(?:video|audio)s?(?:[ _-]?(?:path|file|url)s?)?", re.IGNORECASE)
_IMAGE_FILE = re.compile(
    r"(?:data:image/.*|[^\n]{1,300}\.(?:png|jpe?g|jfif|webp|gif|bmp|tiff?|ppm|avif|heic|svg)(?:\?\S*)?)", re.I | re.S
)


def overlooked_images(columns: Mapping[str, object], has_images: bool, named: Collection[str]) -> str:
    """What is wrong with the columns of a row that are neither its images nor of the schema, or "".

    Args:
        has_images: the row has images in `images` or `image`; beside them only a further numbered one is suspect.
        named: columns that the user has spoken of, which are what he says.
    """
    for name, value in columns.items():
        if name in named or not value or not isinstance(value, str | bytes | list | Mapping):
            continue
        if not has_images and _is_pixels(name, value):
            return (
                f"the column {name!r} holds pixels as numbers, which are not read: write the image to a file "
                f"(PIL.Image.fromarray), leave it out with --rename {name}=, or keep it as metadata with --rename "
                f"{name}={name}"
            )
        if _OTHER_MEDIA.fullmatch(name):
            return f"the column {name!r} holds video or sound, which is not read; leave it out with --rename {name}="
        by_name = _IMAGE_NAME.fullmatch(name)
        if (by_name and _NUMBERED.fullmatch(name)) if has_images else (by_name or _is_image(value)):
            return (
                f"the column {name!r} looks like an image, and the sample would be built without it: give it with "
                f"--rename {name}=images (several columns are joined), leave it out with --rename {name}=, or keep it "
                f"as metadata with --rename {name}={name}"
            )
    return ""


def _is_pixels(name: str, value: object) -> bool:
    """Numbers in rows (by the column's name), or in rows of 1, 3 or 4 colours; boxes and matrices are neither."""
    depth, sizes, inner = 0, list[int](), value
    while isinstance(inner, list) and inner:
        depth, sizes, inner = depth + 1, [*sizes, len(inner)], inner[0]
    if not isinstance(inner, int | float) or isinstance(inner, bool):
        return False
    if _PIXEL_NAME.fullmatch(name) or _IMAGE_NAME.fullmatch(name):
        return depth > 1 or (depth == 1 and sizes[0] >= _LEAST_SIDE**2)
    return depth == 3 and min(sizes[:2]) >= _LEAST_SIDE and sizes[2] in (1, 3, 4)


def _is_image(value: object) -> bool:
    """Bytes, what `datasets` stores, base64, or a path or URL that ends like one; or what holds such a thing."""
    match value:
        case bytes():
            return True
        case str():
            written_out = len(value) >= _MIN_BASE64 and value.startswith(BASE64_HEADS)
            return written_out or bool(_IMAGE_FILE.fullmatch(value))
        case Mapping():
            return ("bytes" in value and "path" in value) or any(map(_is_image, value.values()))
        case list():
            return any(map(_is_image, value))
    return False
