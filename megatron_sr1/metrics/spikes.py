"""Steps whose gradient is far from what it was: said, and kept with what each stream did in them."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_sr1.metrics.files import JsonlSink, read_jsonl

WINDOW = 50  # steps that say what is usual
LEAST = 10  # of them, before anything is called a spike
TIMES = 5.0  # the usual
_STREAM = "loss/"


class SpikeSink:
    """Writes `<run_dir>/spikes.jsonl` and says a line for each step whose gradient norm is over TIMES the median of the
    WINDOW steps before it. Which stream it comes from is told by those of its numbers, `loss/<stream>/...`, that are as
    far from theirs. The optimizer has clipped the gradient by then: nothing else is done about it.

    What is usual is read from `metrics.jsonl`, so a run that goes on finds what one that was never interrupted finds.
    """

    def __init__(self, run_dir: Path, start_step: int, clip_grad: float, say: Callable[[str], None]) -> None:
        """
        Args:
            start_step: the first step that will be written.
            clip_grad: the norm that gradients are clipped to.

        Raises:
            ValueError: see `read_jsonl`.
        """
        self._clip, self._say = clip_grad, say
        self._path = run_dir / "spikes.jsonl"
        self._seen: deque[Mapping[str, float | None]] = deque(maxlen=WINDOW)
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists():
            self._seen.extend(entry for entry in read_jsonl(metrics) if (entry["step"] or 0) < start_step)
        if self._path.exists():  # without those that come again
            JsonlSink(self._path, start_step).close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Looks at the step, then counts it among what is usual."""
        usual = self._usual("grad_norm")
        norm = values.get("grad_norm", math.nan)
        if usual is not None and math.isfinite(norm) and norm > TIMES * usual:
            self._keep(step, norm, usual, values)
        self._seen.append(dict(values))

    def _usual(self, name: str) -> float | None:
        """The median of what it was, without its sign; None: too little is known."""
        found = [abs(value) for entry in self._seen if (value := entry.get(name)) is not None and math.isfinite(value)]
        return statistics.median(found) if len(found) >= LEAST else None

    def _keep(self, step: int, norm: float, usual: float, values: Mapping[str, float]) -> None:
        streams: dict[str, dict[str, tuple[float, float]]] = {}
        for name, value in values.items():
            if not name.startswith(_STREAM) or not math.isfinite(value):
                continue
            was = self._usual(name)
            stream, _, number = name.removeprefix(_STREAM).partition("/")
            far = streams.setdefault(stream, {})
            if was is not None and abs(value) > TIMES * was:
                far[number or stream] = (value, was)  # a loss of the user's own names its numbers as it likes
        entry = {"step": step, "grad_norm": norm, "usual": usual, "streams": streams}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        told = "; ".join(f"{stream}: {_told(far)}" for stream, far in streams.items())
        self._say(
            f"step {step + 1}: the gradient norm {norm:.3g} is {norm / usual:.0f} times its usual {usual:.3g}"
            + (f" and was clipped to {self._clip:g}" if norm > self._clip else "")
            + (f"; {told}" if told else "")
        )


def _told(far: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} {value:.3g} (usually {was:.3g})" for name, (value, was) in far.items()) or "as usual"
