"""Numbers that change over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleShape = Literal["linear", "cosine", "sigmoid"]


@dataclass(frozen=True)
class Schedule:
    """Of one number: from `start` at step 0 to `end` at step `steps`, which it keeps. With d = step / steps it is
    end + left (start - end), where `left` is

        linear    1 - d
        cosine    (1 + cos(pi d)) / 2
        sigmoid   1 - 1 / (1 + exp(-slope (d - middle)))        NoisyRollout, arXiv 2504.13055, section 3

    A sigmoid touches neither end: at step 0 it is 1 / (1 + exp(slope middle)) of the way from `start`.
    """

    key: str
    start: float
    end: float
    steps: int
    shape: ScheduleShape = "linear"
    slope: float = 30.0  # of a sigmoid
    middle: float = 2 / 3  # share of the steps after which it is half of the way

    def at(self, step: int) -> float:
        """The number of a step."""
        if step >= self.steps:
            return self.end
        done = step / self.steps
        left = 1.0 - done
        if self.shape == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        elif self.shape == "sigmoid":
            left = 1.0 / (1.0 + math.exp(self.slope * (done - self.middle)))
        return self.end + (self.start - self.end) * left
