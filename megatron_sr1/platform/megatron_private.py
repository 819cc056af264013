"""Names of Megatron-Core that are not its public interface, each with what it is for and why no public name does.

Seen in megatron-core 0.16.1 and 0.19.2. No other file of the package uses such a name; tests/test_private_names.py
finds the ones that an upgrade has moved. It imports Megatron-Core, so import it after, or while, `start_platform()`
runs.
"""

from __future__ import annotations

import queue
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup


def created_groups() -> list[ProcessGroup]:
    """Every group that `initialize_model_parallel` has created. `destroy_model_parallel` forgets them without
    destroying them, and the getters tell only some."""
    # None stands for the default group
    return [group for group in parallel_state._global_process_group_list or () if group is not None]


def use_cpu_generator() -> None:
    """Makes Megatron's random states, which are those of a CUDA generator, states of torch's CPU generator. Nothing
    public tells it of another generator."""
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def keep_token_counts_on_host() -> None:
    """Drops the CUDA stream on which experts' token counts are copied to the host, where they are already. The
    dispatcher makes that stream without a question."""
    dispatcher: Any = MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = object()  # one is made where there is none; here nobody uses it
    dispatcher._maybe_dtoh_and_synchronize = _counts_for_collectives


def _counts_for_collectives(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """The counts are still tensors, where collectives take sequences of numbers."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            splits = getattr(dispatcher, name)
            if isinstance(splits, torch.Tensor):
                setattr(dispatcher, name, splits.numpy())
    return tokens_per_expert


def read_results_in_process() -> None:
    """Has a synchronous save read its results in the process that wrote them. Megatron's default, a queue in a manager
    process of its own, costs a new interpreter per rank and outlives a killed run; no argument chooses another."""
    filesystem_async._results_queue = queue.Queue()


def name_missing_gemm() -> None:
    """Defines Transformer Engine's matrix product as None where that is not installed. The router asks whether it is
    None by a name that Megatron defines only where it is."""
    module: Any = moe_utils
    module.__dict__.setdefault("te_general_gemm", None)


class OrderedCommunicator(P2PCommunicator):
    """Exchanges shapes in the order in which it exchanges the tensors.

    Of two stages each is the other's previous and next. Megatron posts the messages about shapes in an order in which
    the one for the next stage meets the receiver that waits for the previous one: rows of different lengths would get
    each other's shapes. The schedules take a communicator, but no part of one.
    """

    def __init__(self, group: ProcessGroup, config: Any, device: torch.device) -> None:
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
        assert self.prev_rank is not None and self.next_rank is not None, "a communicator of several stages"
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
        prev, following = (([0, 0, 0] if shape is None else shape.tolist()) for shape in shapes.values())
        return prev, following
