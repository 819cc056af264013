"""What a check says of itself: figures, tables, what is wrong, or why there was nothing to look at."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figure = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Figure]]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.title


@dataclass(frozen=True)
class Report:
    """Of one check that came to its end."""

    figures: Mapping[str, Figure] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    wrong: Sequence[str] = ()  # one line for each thing that is not as it must be
    absent: str = ""  # why the check cannot be made here; empty: it was made

    def write(self, path: Path) -> None:
        """As JSON."""
        tables = [vars(table) for table in self.tables]
        write_json(path, {**vars(self), "figures": dict(self.figures), "tables": tables})

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**tree, "tables": [Table(**table) for table in tree["tables"]]})


class Absent(Exception):
    """The check cannot be made here; says why."""


def write_json(path: Path, tree: Any) -> None:
    """Whole or not at all. A number that is not finite, which JSON cannot hold, becomes text."""
    write_text(path, json.dumps(_finite(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _finite(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree
