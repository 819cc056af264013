"""How long a step takes, and how long what is left will: by the median of the last ones, so that one slow step, or the
first, does not speak for all. Evaluations and checkpoints are no part of a step; those that are due are counted."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from megatron_sr1.phases import Phases, during

WINDOW = 20  # steps, evaluations and checkpoints that the medians are of
EVALUATION, SAVE = "evaluation", "save"  # phases


@dataclass(frozen=True)
class Course:
    """What a run does, in steps that are done."""

    steps: int
    save_every: int = 0  # the last is saved, too; 0: nothing is saved
    evaluate_every: int = 0  # ahead of the next step; 0: none in between
    evaluates_after: bool = False
    heldout_every: int = 0  # held-out losses at the end of these steps and of the last; 0: none

    def num_saves(self, done: int) -> int:
        """Checkpoints that are not begun when so many steps have been measured; that of the last of them is one."""
        every, before = self.save_every, max(done, 1) - 1
        if not every or before >= self.steps:
            return 0
        return self.steps // every - before // every + bool(self.steps % every)

    def num_evaluations(self, done: int) -> int:
        """Evaluations that are left then."""
        every, before = self.evaluate_every, max(done, 1) - 1
        between = max(0, (self.steps - 1) // every - before // every) if every else 0
        held = self.heldout_every
        within = self.steps // held - done // held + bool(self.steps % held) if held and done < self.steps else 0
        return between + within + self.evaluates_after


class Pace:
    """Of a run, from when it is made: at the first step."""

    def __init__(self, course: Course, phases: Phases = during, clock: Callable[[], float] = time.monotonic) -> None:
        self.course = course
        self._phases, self._clock = phases, clock
        self._last, self._was = clock(), {name: phases.spent(name) for name in (EVALUATION, SAVE)}
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._evaluations: deque[float] = deque((s for s in (self._was[EVALUATION],) if s), maxlen=WINDOW)
        self._saves: deque[float] = deque(maxlen=WINDOW)
        self._done: int | None = None

    def step_done(self, done: int) -> None:
        """A step was measured; `done` are, with those of earlier starts. What lies between two is a step with the
        checkpoint of the one before and the evaluation ahead of it."""
        now, spent = self._clock(), {name: self._phases.spent(name) for name in (EVALUATION, SAVE)}
        evaluating, saving = (spent[name] - self._was[name] for name in (EVALUATION, SAVE))
        own = now - self._last - evaluating
        if evaluating > 0:
            self._evaluations.append(evaluating)
        every = self.course.save_every
        if every and self._done is not None and self._done % every == 0:  # else it is what every step settles
            self._saves.append(saving)
            own -= saving
        self._steps.append(max(0.0, own))
        self._last, self._was, self._done = now, spent, done

    @property
    def step_seconds(self) -> float | None:
        """Of the last steps, their median; None before the first."""
        return statistics.median(self._steps) if self._steps else None

    @property
    def seconds_left(self) -> float | None:
        """To the end of the last step, and of the evaluation behind it; None before the first step."""
        if self._done is None or not self._steps:
            return None
        since = self._clock() - self._last
        saving, evaluating = (statistics.median(each) if each else 0.0 for each in (self._saves, self._evaluations))
        course, done = self.course, self._done
        steps = max(0, course.steps - done) * statistics.median(self._steps)
        left = steps + course.num_saves(done) * saving + course.num_evaluations(done) * evaluating
        return max(0.0, left - since)


def duration(seconds: float) -> str:
    """ "0:07", "12:34", "3:12:34", "2 d 03:12:34"."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, minutes, rest = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days} d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
