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
