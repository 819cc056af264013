"""Files of rows, and how tests open them as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_sr1.config import DataConfig
from megatron_sr1.data import (
    Quarantine,
    ShardDataset,
    open_dataset,
)
from tests.build_cases import picture
from tests.data_cases import encoded

ROWS = [{"problem": f"q{i}?", "answer": str(i)} for i in range(6)]


def config(folder: Path, *train: Path | str, **more: Any) -> DataConfig:
    return DataConfig(train=tuple(map(str, train)), cache_dir=str(folder / "cache"), **more)


def opened(data: DataConfig, budget: int = 0) -> ShardDataset:
    return open_dataset(data, "train", Quarantine(budget))


def answers(data: DataConfig) -> list[str]:
    found = opened(data)
    return [found.read(i).answer for i in range(len(found))]


def built(folder: Path) -> list[Path]:
    """The folders of the cache."""
    return sorted(path for path in (folder / "cache" / "built").glob("*") if path.is_dir())


def parquet(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows]), path, **options)
    return path


def shown_rows(start: int, num: int = 5) -> list[dict[str, Any]]:
    """As `datasets` writes them, with options and numbers."""
    return [
        {
            "question": f"<image>\nHow many in {i}?",
            "solution": i,
            "images": [{"bytes": encoded(picture(i), "JPEG"), "path": f"{i}.jpg"}],
            "choices": [str(i), "none"],
            "level": f"grade {i}",
        }
        for i in range(start, start + num)
    ]


def hub_folder(folder: Path) -> Path:
    parquet(folder / "data" / "train-00000-of-00002.parquet", shown_rows(10))
    parquet(folder / "data" / "train-00001-of-00002.parquet", shown_rows(15))
    parquet(folder / "data" / "test-00000-of-00001.parquet", shown_rows(30))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "train.jsonl").write_text("hidden\n")
    return folder


RENAMED = {"question": "problem", "solution": "answer"}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
