"""Megatron-Core's pipeline schedules over the packed rows of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.packing import empty_row, moved
from megatron_sr1.platform.megatron_private import OrderedCommunicator
from megatron_sr1.policy.groups import ParallelGroups
from megatron_sr1.types import MicroBatch, Scoring


class Schedule:
    """Runs forward, or forward and backward, of every micro-batch through the chunks of all pipeline stages."""

    def __init__(self, chunks: list[torch.nn.Module], groups: ParallelGroups, config: Config) -> None:
        """`chunks`: this rank's, wrapped for data parallelism, in order."""
        self._chunks = chunks
        self._groups = groups
        self._config = config
        self._device = next(chunks[0].parameters()).device
        self._communicator = OrderedCommunicator(groups.pipeline, chunks[0].config, self._device)

    def run(
        self,
        batches: Sequence[MicroBatch],
        scoring: Scoring,
        *,
        forward_only: bool,
        collect: Callable[[int, Tensor], Any],
        discard: Callable[[Tensor], Any],
    ) -> list[Any]:
        """What `collect(index, output)` made of the last stage's outputs [2, R]; an empty list on other stages.

        Schedules and expert parallelism may ask for more micro-batches than there are: rows of padding are appended,
        whose output, of no scored token, goes to `discard` instead.
        """
        rows = [*batches, *self._padding(batches)]
        if not rows:
            return []

        def forward_step(numbered: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module) -> tuple[Tensor, Any]:
            index, batch = next(numbered)
            output = model(batch, scoring)
            finish = discard if index >= len(batches) else lambda out: collect(index, out)
            return output, (lambda out, non_loss_data=False: finish(out))

        with torch.set_grad_enabled(not forward_only):
            results = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[enumerate(rows) for _ in self._chunks],
                model=self._chunks,
                num_microbatches=len(rows),
                seq_length=max(len(batch.input_ids) for batch in rows),
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
                p2p_communicator=self._communicator,
                pg_collection=self._groups.collection,
            )
        return results[: len(batches)]

    def _padding(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The rows that are missing to the number that every replica must run."""
        number = len(batches)
        if self._config.layout.expert > 1:  # replicas that share experts meet in every layer of every micro-batch
            most = torch.tensor(number, device=self._device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=self._groups.data)
            number = int(most)
        if self._config.layout.virtual > 1:  # the interleaved schedule takes micro-batches in groups of its stages
            number += -number % self._config.layout.pipeline
        if number == len(batches):
            return []
        return [moved(empty_row(self._config.row_multiple), self._device)] * (number - len(batches))
