"""Bad samples: skipped within a budget, each named in a file; past the budget the run stops with the list. So are
samples that are left out, which no budget bounds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_LISTED = 20  # in the error; the file has all


class LeftOut(ValueError):
    """A sample that is whole, and not for this run: too long, say. It does not count as bad."""


@dataclass(frozen=True, order=True)
class BadSample:
    """What cannot be used: a sample, a member, or (key "") the rest of a shard."""

    shard: str  # what `ShardDataset` calls it; of a row that is in no shard its file and row
    key: str
    reason: str  # names shard and key too, and says what to do
    counts: bool = True  # as bad; False: it is left out


class Quarantine:
    """The distinct bad samples of a run. A budget of 0 stops at the first one."""

    def __init__(self, budget: int, file: Path | None = None) -> None:
        """`file` gets one JSON object {shard, key, reason} a line; None: no file, which all ranks but one want."""
        self._budget = budget
        self._file = file
        self._bad: dict[tuple[str, str], BadSample] = {}
        if file is not None:
            file.unlink(missing_ok=True)  # of an earlier run; one that goes on remembers its own

    def add(self, bad: BadSample) -> None:
        """Notes a bad sample, once.

        Raises:
            ValueError: there are more than the budget allows; the message lists them.
        """
        if (bad.shard, bad.key) in self._bad:
            return
        self.remember([bad])
        if self.num_bad > self._budget:
            raise ValueError(self._message())

    def remember(self, samples: Iterable[BadSample]) -> None:
        """Notes what an earlier part of the run found: it counts, but does not stop the run by itself."""
        self._bad |= {(bad.shard, bad.key): bad for bad in samples if (bad.shard, bad.key) not in self._bad}
        if self._file is not None and self._bad:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(".tmp")
            lines = [json.dumps(asdict(bad)) + "\n" for bad in self._bad.values()]
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, self._file)

    def __contains__(self, place: tuple[str, str]) -> bool:
        """Whether (shard, key) is known to be bad."""
        return place in self._bad

    @property
    def num_bad(self) -> int:
        """Those that count."""
        return sum(bad.counts for bad in self._bad.values())

    @property
    def budget(self) -> int:
        """How many bad samples are let pass."""
        return self._budget

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """In the order they were found."""
        return tuple(self._bad.values())

    def _message(self) -> str:
        reasons = [bad.reason for bad in self._bad.values() if bad.counts]
        if self._budget == 0:
            return reasons[0]
        listed = "\n".join(f"  {reason}" for reason in reasons[:MAX_LISTED])
        more = f"\n  and {len(reasons) - MAX_LISTED} more" if len(reasons) > MAX_LISTED else ""
        return (
            f"data.max_bad_samples={self._budget} is exceeded: these samples cannot be used.\n{listed}{more}\n"
            f"Mend the shards, or allow more{'' if self._file is None else f' (all are in {self._file})'}."
        )
