"""Every sink of a run behind one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console

from megatron_sr1.metrics.files import JsonlSink, TensorBoardSink
from megatron_sr1.metrics.pace import Pace
from megatron_sr1.metrics.progress import ProgressSink, plain_pace
from megatron_sr1.metrics.samples import SampleRow
from megatron_sr1.metrics.tracking import Trackers


class MetricsSink(Protocol):
    """Takes the reduced metrics of each step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...


class _File(MetricsSink, Protocol):
    def close(self) -> None: ...


class MetricsWriter:
    """Every sink of a run: `<run_dir>/metrics.jsonl`, `<run_dir>/tensorboard/`, the progress bar. Use on one rank only.

    Args:
        run_dir: the run's folder, made where missing.
        start_step: the first step that will be written, 0 for a new run.
        total_steps: how many the run has.
        console: where progress goes; standard output by default.
        further: sinks that whoever made them opens and closes, the run's `Trackers` for one.
        pace: of the run, which is told of each step before any sink; None: of one that only does steps.
        samples: take the samples that `show` is given; the trackers of `further`.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        console: Console | None = None,
        further: Sequence[MetricsSink] = (),
        pace: Pace | None = None,
        samples: Trackers | None = None,
    ) -> None:
        self._run_dir, self._start = run_dir, start_step
        self._pace = pace or plain_pace(total_steps)
        self._console = console or Console()
        self._files: list[_File] = []
        self._further, self._samples = further, samples

    def __enter__(self) -> MetricsWriter:
        self._files = [
            JsonlSink(self._run_dir / "metrics.jsonl", self._start),
            TensorBoardSink(self._run_dir / "tensorboard", self._start),
            ProgressSink(self._start, self._console, self._pace),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for sink in self._files:
                stack.callback(sink.close)  # the last first: the terminal is given back whatever a disk does

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the reduced metrics of `step` (the first is 0) to every sink."""
        self._pace.step_done(step + 1)
        for sink in (*self._files, *self._further):
            sink.write(step, values)

    def show(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Hands samples of the rollouts of `step` to trackers."""
        if rows and self._samples is not None:
            self._samples.show(step, rows)
