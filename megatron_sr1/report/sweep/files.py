"""The numbers of a sweep with all their digits: sweep.csv, one line per group and measure, and sweep.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_sr1.report.sweep.groups import GroupRow
from megatron_sr1.report.sweep.tables import markdown

CSV_HEAD = (
    *("group", "preset", "variant", "measure", "seeds", "mean", "std", "before_mean", "before_std"),
    *("paired_seeds", "paired_difference", "paired_standard_error"),
)


def write_sweep_files(rows: Sequence[GroupRow], folder: Path) -> list[Path]:
    """Writes sweep.md, sweep.csv and sweep.json; shares are in [0, 1] there, empty or null is unknown."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sweep.{kind}" for kind in ("md", "csv", "json")]
    paths[0].write_text(markdown(rows), encoding="utf-8")
    with paths[1].open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([CSV_HEAD, *_csv_lines(rows)])
    paths[2].write_text(json.dumps([_tree(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return paths


def _csv_lines(rows: Sequence[GroupRow]) -> Iterator[tuple[Any, ...]]:
    for row in rows:
        for key, after in row.after.items():
            before, difference = row.before.get(key), row.differences.get(key)
            start = (None, None) if before is None else (before.mean, before.std)
            paired = (None,) * 3 if difference is None else (difference.num, difference.mean, difference.error)
            yield (row.label, row.preset, row.variant, key, after.num, after.mean, after.std, *start, *paired)


def _tree(row: GroupRow) -> dict[str, Any]:
    return {
        "group": row.label,
        "preset": row.preset,
        "variant": row.variant,
        "after": {key: asdict(value) for key, value in row.after.items()},
        "before": {key: asdict(value) for key, value in row.before.items()},
        "paired_differences_to_the_first": {key: asdict(value) for key, value in row.differences.items()},
        "by_seed": {seed: dict(values) for seed, values in row.per_seed.items()},
        "before_by_seed": {seed: dict(values) for seed, values in row.before_per_seed.items()},
        "unfinished": list(row.unfinished),
    }
