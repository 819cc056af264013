"""Samples and shards for the tests of the data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_sr1.types import Prompt, SftSample

QUESTION = {"problem": "How many?", "answer": "3"}


def picture(level: int, width: int = 5) -> Image.Image:
    return Image.fromarray(np.full((4, width, 3), level, dtype=np.uint8))


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image that does not compress; size is width, height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def png(level: int) -> bytes:
    return encoded(picture(level))


def write_tar(path: Path, members: Mapping[str, bytes | dict]) -> Path:
    """A tar as any tool would write it: no code of ours."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def prompts(num: int, start: int = 0) -> list[Prompt]:
    return [
        Prompt(f"p{i:03d}", f"Frage {i} größer?", str(i), (picture(i % 256),), "count", {"facts": [i]})
        for i in range(start, start + num)
    ]


def equal(left: Prompt | SftSample, right: Prompt | SftSample) -> bool:
    """Same fields, same pixels."""
    a, b = (s.prompt if isinstance(s, SftSample) else s for s in (left, right))
    pixels = len(a.images) == len(b.images) and all(
        x.mode == y.mode == "RGB" and x.tobytes() == y.tobytes() for x, y in zip(a.images, b.images, strict=True)
    )
    fields = (a.key, a.problem, a.answer, a.source, a.metadata) == (b.key, b.problem, b.answer, b.source, b.metadata)
    if isinstance(left, SftSample) and isinstance(right, SftSample):
        fields &= (left.template, left.response, left.description) == (
            right.template,
            right.response,
            right.description,
        )
    return pixels and fields and type(left) is type(right)
