"""Takes what the training of a step measures of each token, and writes it beside the step's rollouts.

Shape legend: R scored tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_sr1.packing import gather_rows
from megatron_sr1.policy import Policy
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import StreamRows
from megatron_sr1.training.ledger import Slot, StepLedger, slots_of
from megatron_sr1.training.token_files import MeasuredResponse, ResponseName, remove_tokens, write_tokens

Measured = Mapping[str, tuple[Tensor, Tensor]]  # of a row, by name: [R] values, and [R] bool: whether they are known
_LARGEST = torch.finfo(torch.float16).max


class TokenWriter:
    """Of one rank, for a run."""

    def __init__(
        self, folder: Path, slots: Sequence[Slot], replica: int, num_replicas: int, *, writes: bool, removes: bool
    ) -> None:
        """
        Args:
            folder: of the rollouts.
            slots: see `slots_of`.
            writes: whether the rank is the one that writes for its replica, of those that have the scores.
            removes: whether it removes what is there of a step.
        """
        self._folder, self._slots = folder, slots
        self._part = (replica, num_replicas)
        self.writes, self._removes = writes, removes
        self._taken: list[MeasuredResponse] = []

    @classmethod
    def of(cls, folder: Path, policy: Policy, preset: Preset) -> TokenWriter:
        """Of this rank: of those that have the scores of a replica, the first writes."""
        groups, replicas = policy.groups, policy.replicas
        writes = groups.is_last_stage and groups.tensor_context.rank() == 0
        place = (folder, slots_of(preset), replicas.rank, replicas.num_ranks)
        return cls(*place, writes=writes, removes=policy.platform.is_main)

    @classmethod
    def nothing(cls) -> TokenWriter:
        """One that leaves everything as it is."""
        return cls(Path(), (), 0, 1, writes=False, removes=False)

    def begin(self, step: int) -> None:
        """Before any rank writes: all must meet in between."""
        self._taken = []
        if self._removes:
            remove_tokens(self._folder, step)

    def take(self, rows: StreamRows, ledger: StepLedger, measured: Mapping[int, Measured]) -> None:
        """What an optimizer step has measured.

        Args:
            ledger: that the rows are of.
            measured: by micro-batch; {} where another rank has them.
        """
        if not self.writes or not measured:
            return
        batches, count = rows.micro_batches, rows.num_responses
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}  # by name, of each response
        for name in measured[0]:
            pairs = [measured[index][name] for index in range(len(batches))]
            values = gather_rows([_half(value) for value, _ in pairs], batches, count)
            known = gather_rows([has.cpu() for _, has in pairs], batches, count)
            found[name] = list(zip(values, known, strict=True))
        ids = gather_rows([batch.targets.cpu() for batch in batches], batches, count)
        numbers = ledger.number.tolist()
        for index, (group, sample, place) in enumerate(rows.share):
            slot = self._slots[place]
            name = ResponseName(numbers[group], sample, slot.pass_name, slot.number)
            own = {key: pairs[index][0] for key, pairs in found.items() if pairs[index][1].any()}
            self._taken.append(MeasuredResponse(name, ids[index].tolist(), own))

    def write(self, step: int) -> None:
        """The file of the step; see `write_tokens`."""
        taken, self._taken = self._taken, []
        if self.writes:  # a part without responses, too: one that is missing is missed
            write_tokens(self._folder, step, taken, *self._part)


def _half(values: Tensor) -> Tensor:
    """On the CPU; what is finite stays finite."""
    bounded = values.clamp(-_LARGEST, _LARGEST)
    return torch.where(values.isfinite(), bounded, values).to(device="cpu", dtype=torch.float16)
