"""Columns that look like images under a name that is not asked for: a sample must not lose its images in silence."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# image_path, img, image_file, image_url, image_0, photos ...; not image_id, image_width
_IMAGE_NAME = re.compile(
    r"(?:image|img|picture|pic|photo)s?[ _-]?"
    r"(?:(?:file[ _-]?)?(?:path|file|name|url|uri|link|bytes|data|base64|b64)s?)?[ _-]?\d*",
    re.IGNORECASE,
)
_NUMBERED = re.compile(r".*\d", re.DOTALL)
_OTHER_MEDIA = re.compile(r"(?:video|audio)s?(?:[ _-]?(?:path|file|url)s?)?", re.IGNORECASE)
_IMAGE_FILE = re.compile(
    r"(?:data:image/.*|\S+\.(?:png|jpe?g|jfif|webp|gif|bmp|tiff?|ppm|avif|heic|svg)(?:\?\S*)?)", re.I | re.S
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
    """Bytes, what `datasets` stores, or a path or URL that ends like one."""
    match value:
        case bytes():
            return True
        case str():
            return bool(_IMAGE_FILE.fullmatch(value))
        case Mapping():
            return "bytes" in value and "path" in value
        case list():
            return any(map(_is_image, value))
    return False
