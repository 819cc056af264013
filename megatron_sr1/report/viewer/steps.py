"""Which of the saved steps a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def chosen_steps(saved: Sequence[int], wanted: Sequence[int] | None, most: int, run: Path) -> list[int]:
    """In order.

    Args:
        saved: in order.
        wanted: (): all; None: at most `most`, the first and the last, and others at equal distances between them.

    Raises:
        ValueError: one that is wanted is not saved; the message names the run.
    """
    if wanted and saved:  # a run without rollouts, an evaluation say, may stand beside one that has them
        missing = [step for step in wanted if step not in saved]
        if missing:
            known = ", ".join(map(str, saved)) or "none"
            raise ValueError(f"{run} has no rollouts of step {missing[0]}. It has those of {known}.")
        return sorted(set(wanted))
    if wanted is not None or len(saved) <= most:
        return list(saved)
    places = {round(place * (len(saved) - 1) / (most - 1)) for place in range(most)}
    return [saved[place] for place in sorted(places)]
