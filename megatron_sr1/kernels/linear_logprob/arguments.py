"""What the functions over the output head are given, checked; each raises ValueError that says what does not fit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce, get_world_size


def is_rounded(logits: str) -> bool:
    """Whether products are rounded to bfloat16."""
    if logits not in ("fp32", "bf16"):
        raise ValueError(f'the output head: logits={logits!r} is not allowed: use "fp32" or "bf16".')
    return logits == "bf16"


def check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Hidden states [T, H] and the head [V_local, H] of one dtype, a target [T] for each."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"the output head: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: "
            "they must be [T, H] and [V_local, H]. Flatten batch and sequence before the head."
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"the output head: targets are {targets.dtype} {tuple(targets.shape)}; one int64 id per row of hidden "
            f"is needed, [{hidden.shape[0]}]."
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"the output head: hidden is {hidden.dtype} and weight is {weight.dtype}; both must be the same "
            "floating-point dtype. Cast one of them."
        )


def bias_of(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    """[V_local] in the accumulation dtype, a constant."""
    if bias is None:
        return None
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"the output head: logit_bias {tuple(bias.shape)} must be one number per row of weight, "
            f"[{weight.shape[0]}]."
        )
    return bias.detach().to(torch.promote_types(weight.dtype, torch.float32))


def accumulator(into: Tensor | None, weight: Tensor) -> Tensor | None:
    """[V_local, H], that the gradient of the head is added to."""
    accumulate = torch.promote_types(weight.dtype, torch.float32)
    if into is not None and (into.shape != weight.shape or into.dtype != accumulate or into.device != weight.device):
        raise ValueError(
            f"the output head: accumulate_into is {into.dtype} {tuple(into.shape)} on {into.device}; the gradient of "
            f"weight needs {accumulate} {tuple(weight.shape)} on {weight.device}."
        )
    return into


def vocabulary_size(weight: Tensor, group: ProcessGroup | None, start: int, size: int | None) -> int:
    """Number of ids that a target may name."""
    stop = start + weight.shape[0]
    if start < 0 or (group is None and start != 0):
        raise ValueError(f"the output head: vocab_start={start} needs a tp_group; a whole head starts at 0.")
    if size is not None and (size < 1 or (group is None and size > stop)):
        raise ValueError(
            f"the output head: vocab_size={size} is not in [1, {stop}], the rows of the head. "
            "Where weight is one shard of the head, pass tp_group."
        )
    if size is not None or group is None or get_world_size(group) == 1:
        return stop if size is None else size
    last = torch.tensor(stop, device=weight.device)
    all_reduce(last, op=ReduceOp.MAX, group=group)
    return int(last)


def inverse_temperature_of(temperature: float | Tensor, hidden: Tensor) -> Tensor | None:
    """[T] in the accumulation dtype, None for a temperature of 1."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"the output head: temperature={temperature} is not allowed: it must be greater than 0.")
        if temperature == 1:
            return None
        temperature = torch.tensor(temperature, dtype=torch.float64, device=hidden.device)
    elif temperature.shape not in ((), hidden.shape[:1]) or not (temperature > 0).all():
        raise ValueError(
            f"the output head: temperature {tuple(temperature.shape)} must be one number or one per token "
            f"[{hidden.shape[0]}], all greater than 0."
        )
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    return temperature.detach().double().reciprocal().to(accumulate).expand(hidden.shape[0])
