"""Files in the layout of public sets, and what tools/build_benchmark.py makes of them."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megatron_sr1.data import ShardDataset, expand_shards
from megatron_sr1.data.build.check import check_shards
from megatron_sr1.rewards import grade
from megatron_sr1.types import Prompt
from tests.data_cases import encoded, picture, png

TOOLS = Path(__file__).parents[1] / "tools"
LETTER = "Answer with the letter of the correct option."
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])  # as `datasets` stores an image
BENT = png(9)[:40]


def load_tool() -> Iterator[ModuleType]:
    """For a fixture that gives the tool's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("build_benchmark")


def struct(level: int, kind: str = "PNG") -> dict[str, Any]:
    return {"bytes": encoded(picture(level), kind), "path": f"{level}.{kind.lower()}"}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], images: Sequence[str] = ()) -> Path:
    """`images`: columns that are images also where every row has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist([{name: row.get(name) for name in (*rows[0], *images)} for row in rows])
    for name in images:
        column = pyarrow.array([row.get(name) for row in rows], IMAGE)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def write_json(path: Path, tree: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in tree] if path.suffix == ".jsonl" else [json.dumps(tree)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_images(folder: Path, levels: Mapping[str, int]) -> None:
    for name, level in levels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(level).save(folder / name)


def build(tool: ModuleType, name: str, source: Path, out: Path, *more: object) -> list[Prompt]:
    """Builds twice, which must give the same bytes, and reads every sample back."""
    for folder in (out, out.with_name(f"{out.name}-again")):
        options = ("--out", folder, "--workers", 0, *more)
        tool.main([name, "--input", str(source), *map(str, options)])
    assert hashes(out) == hashes(folder) != {}
    assert check_shards(out, 0, lambda done, total: None).wrong == ()
    dataset = ShardDataset(expand_shards([str(out / "*.tar")], "out"))
    found = [dataset.read(index) for index in range(len(dataset))]
    assert all(isinstance(sample, Prompt) for sample in found)
    return found


def hashes(folder: Path) -> dict[str, str]:
    """Of shards, indices and problems; the report also holds the times of the input files."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.endswith("report.json")
    }


def left_out(out: Path, name: str) -> list[tuple[str, str, str]]:
    """(file and row, kind, reason)"""
    lines = (out / f"{name}.problems.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    counts = json.loads((out / f"{name}.report.json").read_text())["left_out"]
    assert sum(counts.values()) == len(problems)
    return [(Path(problem["where"]).name, problem["kind"], problem["reason"]) for problem in problems]


def levels(sample: Prompt) -> list[int]:
    """Which pictures are shown; their pixels are all of one grey."""
    assert all(image.mode == "RGB" and image.tobytes() == picture(_grey(image)).tobytes() for image in sample.images)
    return [_grey(image) for image in sample.images]


def _grey(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def graded(sample: Prompt, right: Sequence[str], wrong: Sequence[str]) -> None:
    for answer in right:
        assert grade(answer, sample.answer), (answer, sample.answer)
    for answer in wrong:
        assert not grade(answer, sample.answer), (answer, sample.answer)
