"""The one result: JSON for machines, Markdown for people, with nothing in it of where it was made."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.private import scrubbed, scrubbed_tree
from benchmarks.gpu_check.report import Figure, Table, write_json, write_text
from benchmarks.gpu_check.runner import STATUSES, Outcome


@dataclass(frozen=True)
class Result:
    """Of one call of the command."""

    day: str  # ISO date
    asked_for: Sequence[str]  # names of --only; empty: everything
    budget_s: float
    wall_s: float
    outcomes: Sequence[Outcome]

    @property
    def environment(self) -> Mapping[str, Figure]:
        """What the check `environment` found; empty before it has run, or where it failed."""
        return next((o.report.figures for o in self.outcomes if o.check.name == "environment"), {})

    @property
    def is_fine(self) -> bool:
        """Everything that can be checked here was, and passed."""
        return all(outcome.status in ("passed", "absent") for outcome in self.outcomes)

    def tree(self) -> dict[str, Any]:
        """As JSON has it, scrubbed."""
        return scrubbed_tree(
            {
                "command": "make gpu-check",
                "day": self.day,
                "asked_for": list(self.asked_for),
                "budget_s": round(self.budget_s, 1),
                "wall_s": round(self.wall_s, 1),
                "fine": self.is_fine,
                "checks": [_entry(outcome) for outcome in self.outcomes],
            }
        )

    def write(self, stem: Path) -> None:
        """`<stem>.json` and `<stem>.md`, each whole or not at all."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_json(stem.with_name(f"{stem.name}.json"), self.tree())
        write_text(stem.with_name(f"{stem.name}.md"), scrubbed("\n".join(self._lines()) + "\n"))

    def _lines(self) -> Iterator[str]:
        asked = f"; asked for {', '.join(self.asked_for)} alone" if self.asked_for else ""
        yield f"# gpu-check, {self.day}, {self.environment.get('cards', 'machine unknown')}"
        yield ""
        counts = {status: sum(outcome.status == status for outcome in self.outcomes) for status in STATUSES}
        told = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
        yield f"{told}; {self.wall_s:.0f} s of {self.budget_s:.0f} s{asked}."
        yield ""
        yield from _table(
            Table(
                "",
                ("check", "status", "s", "what", "why"),
                [(o.check.name, o.status, f"{o.seconds:.0f}", o.check.what, o.reason) for o in self.outcomes],
            )
        )
        for outcome in self.outcomes:
            yield from _section(outcome)


def _section(outcome: Outcome) -> Iterator[str]:
    report = outcome.report
    if not (report.figures or report.tables or outcome.tail):
        return
    yield from ("", f"## {outcome.check.name}")
    if report.figures:
        yield ""
        yield from _table(Table("", ("figure", "value"), list(report.figures.items())))
    for table in report.tables:
        yield from ("", f"**{table.title}**", "")
        yield from _table(table)
    if outcome.tail:
        yield from ("", "The last lines:", "", "```", *outcome.tail.replace("```", "'''").splitlines(), "```")


def _table(table: Table) -> Iterator[str]:
    yield "| " + " | ".join(table.columns) + " |"
    yield "|" + "---|" * len(table.columns)
    for row in table.rows:
        yield "| " + " | ".join(_cell(value) for value in row) + " |"


def _cell(value: Figure) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return re.sub(r"\s+", " ", str(value)).replace("|", r"\|")


def _entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.check.name,
        "what": outcome.check.what,
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 1),
        "limit_s": outcome.check.limit_s,
        "figures": dict(outcome.report.figures),
        "tables": [vars(table) for table in outcome.report.tables],
        "tail": outcome.tail.splitlines(),
    }


def free_stem(folder: Path, day: str, card: str) -> Path:
    """`<day>-<card>` in the folder, with a number behind it where there is such a result already."""
    name = f"{day}-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-') or 'unknown'}"
    taken = (name if n == 1 else f"{name}-{n}" for n in range(1, 10**6))
    ends = ("md", "json")
    return next(folder / stem for stem in taken if not any((folder / f"{stem}.{end}").exists() for end in ends))
