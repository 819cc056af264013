"""The folder beside a page: chunks of data as scripts, which a page of file:// can load, and images.

It is written under another name and takes its place when it is whole. A folder that no report has made is left alone.
"""

from __future__ import annotations

import base64
import mimetypes
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sr1.report.viewer.script_json import script_json

IMAGES = "images"
_MARK = ".made-by-megatron-sr1-report"
_BEGIN, _END = "sr1Chunk(", ");\n"


class ChunkFolder:
    """Of one page.

    Raises:
        ValueError: a folder of this name is there, and no report has made it.
    """

    def __init__(self, page: Path) -> None:
        self.folder = page.with_name(f"{page.stem}_files")
        self.stamp = secrets.token_hex(4)  # in the names of chunks: a page that is open finds no other one's
        self.images: dict[str, str] = {}  # of a folded page: data addresses by name
        if self.folder.exists() and not (self.folder / _MARK).is_file():
            raise ValueError(
                f"{self.folder} is there, and no report has made it: its data would go there. Name the page otherwise "
                "with --out, or move the folder."
            )
        # its own: another report may be writing the same page
        self._new = Path(tempfile.mkdtemp(prefix=f".{page.stem}_files.", suffix=".new", dir=page.parent))
        self._new.chmod(0o755)
        self.image_folder.mkdir()
        (self._new / _MARK).touch()
        self.num_bytes = 0  # of what is written

    @property
    def image_folder(self) -> Path:
        """Where images are written; their names in it are what the chunks say."""
        return self._new / IMAGES

    def write(self, name: str, value: Any) -> None:
        """A chunk, which is read by its name."""
        text = f"{_BEGIN}{script_json(name)},{script_json(value)}{_END}"
        (self._new / f"{name}.js").write_text(text, encoding="ascii")
        self.num_bytes += len(text)

    def all_bytes(self) -> int:
        """Of chunks and images."""
        return self.num_bytes + sum(file.stat().st_size for file in self.image_folder.iterdir())

    def place(self) -> None:
        """Puts the folder where the page looks for it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self._new, self.folder)

    def fold(self) -> Iterator[tuple[str, str]]:
        """Name and JSON of each chunk, and last `images` with the address of each; nothing of the folder stays."""
        for file in sorted(self._new.glob("*.js")):
            name = file.name.removesuffix(".js")
            text = file.read_text(encoding="ascii").removesuffix(_END)
            yield name, text[len(_BEGIN) + len(script_json(name)) + 1 :]
        yield IMAGES, script_json({file.name: image_address(file) for file in sorted(self.image_folder.iterdir())})
        self.discard()
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Removes what is not in its place yet."""
        shutil.rmtree(self._new, ignore_errors=True)


def image_address(path: Path) -> str:
    """The image as a data address.

    Raises:
        ValueError: the name does not end like an image's.
    """
    kind, _ = mimetypes.guess_type(path.name)
    if kind is None or not kind.startswith("image/"):
        raise ValueError(f"{path} is not an image file by its name: use .png, .jpg or .webp.")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
