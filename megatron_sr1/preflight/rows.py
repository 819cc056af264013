"""What a check says: a row of the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """One check. Its remedy says what to do, and is empty where nothing is."""

    name: str
    verdict: Verdict
    found: str  # what was measured
    remedy: str = ""

    def __str__(self) -> str:
        """In one line."""
        return f"{self.name}: {self.found.rstrip('.')}." + (f" {self.remedy}" if self.remedy else "")


def not_checked(name: str, why: str, remedy: str = "") -> Row:
    """A check that could not be made is never passed."""
    return Row(name, "warn", f"not checked: {why}", remedy)


def failed(rows: Sequence[Row]) -> list[Row]:
    """Those that keep a run from starting."""
    return [row for row in rows if row.verdict == "fail"]


def refusal(rows: Sequence[Row]) -> str:
    """One line about rows of which some have failed."""
    wrong = failed(rows)
    more = f" ({len(wrong) - 1} more checks failed, see above.)" if len(wrong) > 1 else ""
    return f"the preflight failed: {wrong[0]}{more} preflight.enabled=false starts the run without it."


def check_rows(rows: Sequence[Row]) -> None:
    """Raises ValueError where one has failed; one line."""
    if failed(rows):
        raise ValueError(refusal(rows))


def table_of(rows: Sequence[Row]) -> str:
    """All rows as text, what to do below each row that asks for something."""
    width = max((len(row.name) for row in rows), default=0)
    lines = []
    for row in rows:
        lines.append(f"{row.verdict:<4}  {row.name:<{width}}  {row.found}")
        if row.remedy:
            lines.append(f"{'':<4}  {'':<{width}}  -> {row.remedy}")
    counts = [f"{sum(row.verdict == verdict for row in rows)} {verdict}" for verdict in ("pass", "warn", "fail")]
    return "\n".join([*lines, ", ".join(counts)])


def to_json(rows: Sequence[Row]) -> str:
    """`{"verdict": ..., "rows": [{"name", "verdict", "found", "remedy"}, ...]}`."""
    verdicts = {row.verdict for row in rows}
    worst = next((verdict for verdict in ("fail", "warn") if verdict in verdicts), "pass")
    return json.dumps({"verdict": worst, "rows": [asdict(row) for row in rows]}, indent=1)
