"""What a tracker is to the rest: a run in it, open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from megatron_sr1.metrics.samples import SampleRow

Ending = Literal["finished", "stopped", "failed"]  # stopped: on request, and saved


class TrackerAway(Exception):
    """It cannot be reached, which may pass."""


class Tracker(Protocol):
    """A run in one tracker. `run_id` is what the tracker knows it by."""

    run_id: str

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def show(self, step: int, name: str, rows: Sequence[SampleRow]) -> None:
        """A table of samples; `name` is that of the step's rollouts or of an evaluation."""
        ...

    def finish(self, ending: Ending) -> None: ...
