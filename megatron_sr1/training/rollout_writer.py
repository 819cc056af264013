"""Writes a step's rollouts while the policy is trained on them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_sr1.prompts import Asked
from megatron_sr1.training.rollout_files import write_rollouts
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import LaterPass


class RolloutWriter:
    """One step at a time, in a thread of its own."""

    def __init__(self, asked: Asked, later: tuple[LaterPass, ...]) -> None:
        """`asked`, `later`: see `write_rollouts`."""
        self._made_by = (asked, later)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-writer")
        self._pending: Future[None] | None = None

    def write(self, path: Path, rollouts: StepRollouts, num_prompts: int, rank: int) -> None:
        """Begins to write what `rank` holds, when the last step is written. Raises as `settle`."""
        self.settle()
        self._pending = self._thread.submit(write_rollouts, path, rollouts, num_prompts, *self._made_by, rank)

    def settle(self) -> None:
        """Waits until everything is on disk. Raises OSError where it cannot be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread when it is done; an error that nobody has waited for is not raised."""
        self._thread.shutdown()
