"""What of the trainer's state leaves the device while engines generate, so that they have its memory.

    gradients   go: an optimizer step begins by zeroing them
    optimizer   moments, and fp32 weights beside those of bf16: to pinned host memory, and back
    reference   the weights the policy started from: the same

A tensor stays what it is, with all its views: its storage shrinks to nothing and grows again. What the model computes
with stays, weights that the optimizer steps in place among it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sr1.config import OffloadConfig


@dataclass
class _Away:
    """A storage that is empty, and what it held; None: zeros will do."""

    storage: torch.UntypedStorage
    num_bytes: int
    kept: Tensor | None


class Offload:
    """Moves storages out and in. Between `leave` and `come_back` nothing may touch their tensors."""

    def __init__(self, config: OffloadConfig, device: torch.device) -> None:
        self._config = config
        self._on_accelerator = device.type != "cpu"
        self._away: list[_Away] = []
        self._host: dict[int, Tensor] = {}  # by the place of a storage in its order: memory that serves every time

    @property
    def is_away(self) -> bool:
        """Whether something is."""
        return bool(self._away)

    def leave(
        self,
        *,
        gradients: Iterable[Tensor],
        optimizer: Iterable[Tensor],
        reference: Iterable[Tensor],
        kept: Iterable[Tensor],
    ) -> None:
        """Takes what the configuration says; what is away already stays so.

        Args:
            kept: tensors whose storages stay, whatever else refers to them.
        """
        if self._away:
            return
        stay = {tensor.untyped_storage().data_ptr() for tensor in kept}
        freed = self._storages(gradients, stay) if self._takes(self._config.gradients) else []
        moved = self._storages(optimizer, stay) if self._takes(self._config.optimizer) else []
        moved += self._storages(reference, stay) if self._takes(self._config.reference) else []
        self._away = [_Away(storage, storage.nbytes(), None) for storage in freed]
        self._away += [self._copied(place, storage) for place, storage in enumerate(moved)]
        if self._on_accelerator:
            torch.accelerator.synchronize()  # once for all copies, which ran beside each other
        for away in self._away:
            away.storage.resize_(0)

    def come_back(self) -> None:
        """Everything as it was; gradients as zeros. The device's next work waits for the copies, the host does not."""
        for away in self._away:
            away.storage.resize_(away.num_bytes)
            values = _bytes_of(away.storage)
            if away.kept is None:
                values.zero_()
            else:
                values.copy_(away.kept, non_blocking=True)
        self._away = []

    def _takes(self, wanted: bool | None) -> bool:
        return self._on_accelerator if wanted is None else wanted

    def _storages(self, tensors: Iterable[Tensor], stay: set[int]) -> list[torch.UntypedStorage]:
        """Each once, in the order of the tensors; without counters, which Megatron and torch keep on the host."""
        found = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.numel() > 1 and storage.data_ptr() not in stay:
                found.setdefault(storage.data_ptr(), storage)
        return list(found.values())

    def _copied(self, place: int, storage: torch.UntypedStorage) -> _Away:
        host = self._host.get(place)
        if host is None or host.numel() != storage.nbytes():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._on_accelerator)
            self._host[place] = host
        host.copy_(_bytes_of(storage), non_blocking=True)
        return _Away(storage, storage.nbytes(), host)


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> Iterable[Tensor]:
    """The parameters that they step, and their state."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All of it, as it lies."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
