"""Where a step's scored rollouts come from: engines that run now, or the files of a run that had some."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from megatron_sr1.data import StepPrompts
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import NamedTensors


class RolloutSource(Protocol):
    """Use it in a `with`, which ends its workers."""

    needs_room: bool  # its engines have the memory that only training needs, from `refresh` to the end of `take`

    def take(self, prompts: StepPrompts, step: int, clock: Clock) -> StepRollouts:
        """The ledger of a step on every rank, and its groups on those that hold them. Collective. The clock notes
        `seconds/rollout`."""
        ...

    def settle(self) -> None:
        """Waits until what is kept of the last step's rollouts is on disk. Raises OSError where it cannot be."""
        ...

    def refresh(self, weights: NamedTensors, version: int) -> None:
        """Takes the policy's weights, with which the next step is drawn. Collective."""
        ...

    def __enter__(self) -> RolloutSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
