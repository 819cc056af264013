"""Megatron-Core's pipeline schedules over the packed rows of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from torch import Tensor

from megatron_sr1.config import Config
from megatron_sr1.packing import empty_row, moved
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
        self._communicator = _OrderedCommunicator(groups.pipeline, chunks[0].config, self._device)

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


class _OrderedCommunicator(P2PCommunicator):
    """Exchanges shapes in the order in which it exchanges the tensors.

    Of two stages each is the other's previous and next. Megatron posts the messages about shapes in an order in which
    the one for the next stage meets the receiver that waits for the previous one: rows of different lengths would get
    each other's shapes.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, config: Any, device: torch.device) -> None:
        super().__init__(pp_group=group, config=config)
        self._device = device

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        def sent(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else torch.tensor(tensor.shape, device=self._device)

        def received(wanted: bool) -> Tensor | None:
            return torch.empty(3, dtype=torch.int64, device=self._device) if wanted else None

        shapes = {"prev": received(recv_prev), "next": received(recv_next)}
        to_prev, to_next = (
            sent(tensor_send_prev),
            sent(tensor_send_next),
        )  # named: they must live until the requests end
        requests = _p2p_ops(
            tensor_send_prev=to_prev,
            tensor_recv_prev=shapes["prev"],
            tensor_send_next=to_next,
            tensor_recv_next=shapes["next"],
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        return tuple([0, 0, 0] if shape is None else shape.tolist() for shape in shapes.values())
