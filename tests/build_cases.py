"""Inputs for tools/build_shards.py, and what it leaves."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from megatron_sr1.data import ShardDataset, expand_shards
from megatron_sr1.types import Prompt, SftSample
from tests.data_cases import encoded, noise, png

TOOL = Path(__file__).parents[1] / "tools" / "build_shards.py"
SEE_THINK = "<description>a dial</description><think>it shows 3</think>\\boxed{3}"
REASONED = "<think>the text says 3</think>\\boxed{3}"
IMAGES = {"r.png": png(1), "g.png": png(2)}
ASKED = {"problem": "Which?", "answer": "3"}


def load_tool() -> Iterator[ModuleType]:
    """For a fixture that gives the tool's module."""
    spec = importlib.util.spec_from_file_location("build_shards_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def picture(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return noise(seed, size)


def write_jsonl(
    folder: Path, rows: Sequence[Mapping[str, Any] | str], images: Mapping[str, bytes] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (images or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def many(folder: Path, num: int = 300) -> Path:
    """Questions with images of different sizes, and some without."""
    images = {f"images/{i}.png": encoded(picture(i, (20 + i % 13, 24))) for i in range(num) if i % 5}
    rows = [
        {"problem": f"Frage {i}?", "answer": str(i), "images": [f"images/{i}.png"] * bool(i % 5)} for i in range(num)
    ]
    return write_jsonl(folder, rows, images)


def run(tool: ModuleType, *arguments: object) -> None:
    tool.main([str(argument) for argument in (*arguments, "--workers", 0)])


def run_jsonl(
    tool: ModuleType, tmp_path: Path, rows: Sequence[Any], images: Mapping[str, bytes], *more: object
) -> Path:
    source, out = write_jsonl(tmp_path / "in", rows, images), tmp_path / "out"
    run(tool, "--input", source, "--format", "jsonl", "--out", out, *more)
    return out


def dataset(out: Path) -> ShardDataset:
    return ShardDataset(expand_shards([str(out / "*.tar")], "out"))


def samples(out: Path) -> list[Prompt | SftSample]:
    found = dataset(out)
    return [found.read(i) for i in range(len(found))]


def problems(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "train.problems.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[str, str]:
    """Hashes of everything, also of hidden files and folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pixels(images: Sequence[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def build(
    tool: ModuleType, tmp_path: Path, row: Mapping[str, Any] | str, *more: object
) -> tuple[Prompt | SftSample | None, dict[str, str]]:
    """The one sample that is made of the row beside a good one, or None and why it is left out."""
    good = {"problem": "good", "answer": "1", "key": "good"}
    out = run_jsonl(tool, tmp_path, [good, row], IMAGES, *more)
    found, left_out = samples(out), problems(out)
    assert len(found) + len(left_out) == 2, "nothing falls away"
    return (found[1], {}) if len(found) == 2 else (None, left_out[0])
