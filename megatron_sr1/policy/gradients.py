"""Completes the gradients of a step across ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from torch import Tensor
from torch.distributed import ProcessGroup


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
    shares = [
        parameter.main_grad
        for chunk in model
        for name, parameter in chunk.module.named_parameters()
        if name.startswith("vision.") and parameter.requires_grad
    ]
    requests = [torch.distributed.all_reduce(share, group=tensor_group, async_op=True) for share in shares]
    for request in requests:
        request.wait()
