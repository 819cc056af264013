"""Seconds spent in each part of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sr1.phases import during


class Clock:
    """`with clock("train"): ...` adds to `seconds/train`, and is a phase of that name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        name, start = f"seconds/{part}", time.perf_counter()
        with during(part):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
