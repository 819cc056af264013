"""Completes the gradients of a step across ranks: in buckets, most of them while backward still goes on.

Megatron sends a bucket as soon as each of its parameters has had as many gradients as in the first step. The vision
tower has none in a row of text, which another replica's row at the same time need not be: its buckets are sent after
backward instead, in one order on every rank. Only the first pipeline stage cuts its gradients in buckets; Megatron
leaves the others', which nothing waits for, in one.

Weights are gathered at the end of an update, not in the next forward (`overlap_param_gather`): Megatron's hooks would
send them in the order in which a replica calls its modules, and a row of text calls no vision tower, so replicas would
meet in different collectives. They do not see the head's weight either, which goes to a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.config import LayoutConfig
from megatron_sr1.policy.groups import ParallelGroups
from megatron_sr1.policy.model import QwenVLModel


def wrap_chunks(
    chunks: Sequence[QwenVLModel], layout: LayoutConfig, groups: ParallelGroups
) -> list[DistributedDataParallel]:
    """This rank's chunks with fp32 gradient buffers that replicas add up, told to the schedule."""
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=layout.distributed_optimizer,
                overlap_grad_reduce=True,
                bucket_size=layout.gradient_bucket,
            ),
            chunk,
            disable_bucketing=number > 0,  # later chunks finish their gradients together
            pg_collection=groups.collection,
        )
        for number, chunk in enumerate(chunks)
    ]
    schedule: Any = chunks[0].config
    schedule.finalize_model_grads_func = partial(add_gradients, tensor_group=groups.tensor)
    no_sync = [model.no_sync for model in wrapped]
    schedule.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def zero_gradients(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Begins a step."""
    for chunk in wrapped:
        vision = set(_vision(chunk))
        groups: Any = chunk.bucket_groups
        for group in groups:
            if group.params & vision:  # what has counted nothing is always in its first step, so it waits for the end
                group.per_param_grad_ready_counts = {}
        chunk.zero_grad_buffer()


def add_gradients(
    model: list[torch.nn.Module], num_tokens: Tensor | None, *, tensor_group: ProcessGroup, **options: Any
) -> None:
    """Megatron's reduction without its division by a token count, for losses carry their own global denominators; then
    the sum of the vision tower's gradients over the tensor-parallel ranks, of which each encoded a share of the images.

    Args:
        model: this rank's chunks, wrapped for data parallelism.
        num_tokens: not used.
    """
    finalize_model_grads(model, num_tokens=None, **options)
    if tensor_group.size() == 1:
        return
    vision: Any = [parameter for chunk in model for parameter in _vision(chunk)]
    shares = [parameter.main_grad for parameter in vision]
    requests = [torch.distributed.all_reduce(share, group=tensor_group, async_op=True) for share in shares]
    for request in requests:
        request.wait()


def _vision(wrapped: Any) -> Iterator[torch.nn.Parameter]:
    """The trained parameters of the vision tower, of a chunk that is wrapped."""
    for name, parameter in wrapped.module.named_parameters():
        if name.startswith("vision.") and parameter.requires_grad:
            yield parameter
