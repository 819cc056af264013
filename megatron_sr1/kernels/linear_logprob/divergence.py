"""KL of the whole distributions of two contexts at each position, straight from hidden states and the output head.

    z = (hidden @ weight.T + logit_bias) / temperature,   y the same of `other`,   p = softmax(z),   q = softmax(y)
    KL(p || q) = sum_j p_j (z_j - y_j)  -  (logsumexp(z) - logsumexp(y))                                        nats

No logits [T, V] of either exist: tiles of both are made, folded into five numbers per row, and made again in backward,

    dKL/dz_j = p_j (log p_j - log q_j - KL),   dKL/dy_j = q_j - p_j

12*T*H*V operations forward and backward through one of the two, 16*T*H*V through both. Two contexts with the same bits
are at distance 0 exactly. Numbers, tensor parallelism, padding and the main gradient are as in function.py: equal on
all ranks of `tp_group`, this rank's part of the gradients of hidden states, `weight`'s shard complete.

The two contexts may be trained apart, in rows of their own. `through` names those whose logits carry the gradient here,
into their hidden states and into `weight`; the gradients of "own" and of "other" add up to that of "both".

Shapes: T rows, H hidden size, V columns of this rank's shard without padding, C columns and R rows of a tile. Memory
beyond the inputs: forward 5 tiles R*C and [T] vectors; backward 4, T*H for each context and C*H of accumulators, and
the gradients themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, all_gather, get_world_size

from megatron_sr1.kernels.linear_logprob import chunked
from megatron_sr1.kernels.linear_logprob.arguments import (
    accumulator,
    bias_of,
    check_tensors,
    inverse_temperature_of,
    is_rounded,
    vocabulary_size,
)
from megatron_sr1.kernels.linear_logprob.tiles import Tile, VocabShard, add_product, dtypes, spans
from megatron_sr1.kernels.linear_logprob.torch_tiles import TorchTiles

Through = Literal["own", "other", "both"]
_TILES = TorchTiles()


@dataclass(frozen=True)
class _Plan:
    """Everything but the tensors that autograd follows."""

    shard: VocabShard
    inverse_temperature: Tensor | None  # [T]; None: 1
    rounded: bool
    through: Through
    accumulate_into: Tensor | None

    def tile(self, rows: slice, left: int, right: int, targets: Tensor) -> Tile:
        """Of these rows and columns. A divergence has no target: `targets` stand for none."""
        scale = None if self.inverse_temperature is None else self.inverse_temperature[rows]
        return Tile(targets, scale, self.shard.bias_of(left, right), self.rounded)


def linear_divergence(
    own: Tensor,
    other: Tensor,
    weight: Tensor,
    *,
    through: Through = "both",
    temperature: float | Tensor = 1.0,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    logit_bias: Tensor | None = None,
    logits: Literal["fp32", "bf16"] = "fp32",
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """KL(p || q) [T] in nats, p of the hidden states `own` and q of `other`; the module tells the details.

    Args:
        own: [T, H] float; T may be 0.
        other: [T, H], same dtype: the hidden states that predict the same tokens in another context.
        weight: [V_local, H], same dtype; this rank's rows of the head.
        through: whose logits the gradient goes through; what is left out is a constant.
        temperature, tp_group, vocab_start, vocab_size, logit_bias, logits, accumulate_into: see `linear_logprob`.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
    """
    targets = torch.zeros(own.shape[:1], dtype=torch.int64, device=own.device)
    check_tensors(own, weight, targets)
    check_tensors(other, weight, targets)
    if through not in ("own", "other", "both"):
        raise ValueError(f"the output head: through={through!r} is not allowed: use own, other or both.")
    size = vocabulary_size(weight, tp_group, vocab_start, vocab_size)
    columns = min(max(size - vocab_start, 0), weight.shape[0])
    plan = _Plan(
        shard=VocabShard(vocab_start, columns, tp_group, bias_of(logit_bias, weight)),
        inverse_temperature=inverse_temperature_of(temperature, own),
        rounded=is_rounded(logits),
        through=through,
        accumulate_into=accumulator(accumulate_into, weight),
    )
    return _Divergence.apply(own, other, weight, plan)


class _Divergence(torch.autograd.Function):
    """Keeps its inputs and three numbers per row."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
        """[T] in the accumulation dtype."""
        state = _merge(_local_state(own, other, weight, plan), plan.shard.group)
        top, total, weighted, other_top, other_total = state.unbind()
        log_total, other_log = total.log(), other_total.log()
        far = weighted / total - ((top - other_top) + (log_total - other_log))  # exactly 0 where both are the same
        ctx.save_for_backward(own, other, weight, far, top + log_total, other_top + other_log)
        ctx.plan = plan
        return far

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grad_outputs  # [T]
        own, other, weight, far, *sums = ctx.saved_tensors
        plan: _Plan = ctx.plan
        scaled = gradient if plan.inverse_temperature is None else gradient * plan.inverse_temperature
        trained = [plan.through in (name, "both") for name in ("own", "other")]
        needs = [ctx.needs_input_grad[place] and trained[place] for place in (0, 1)]
        accumulate, operand = dtypes(own)
        contexts = (own, other)
        grads = [torch.zeros_like(own, dtype=accumulate) if need else None for need in needs]
        into = plan.accumulate_into if ctx.needs_input_grad[2] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None  # padding stays 0
        for left, right in spans(plan.shard.columns, chunked.MAX_TILE_COLUMNS):
            head = weight[left:right].to(operand)
            grad_head = None
            if grad_weight is not None:
                grad_head = torch.zeros_like(head, dtype=accumulate) if into is None else into[left:right]
            for first, last in spans(len(own), chunked.tile_rows(own, right - left)):
                rows = slice(first, last)
                log_p, log_q = _log_probabilities(contexts, head, plan, rows, (left, right), sums)
                for place in (0, 1):
                    if not trained[place]:
                        continue
                    grad_z = _OF_LOGITS[place](log_p, log_q, far[rows, None]).mul_(scaled[rows, None]).to(operand)
                    grad = grads[place]
                    if grad is not None:
                        add_product(grad[rows], grad_z, head)
                    if grad_head is not None:
                        add_product(grad_head, grad_z.t(), contexts[place][rows].to(operand))
            if grad_weight is not None and grad_head is not None and into is None:
                grad_weight[left:right] = grad_head
        if into is not None:
            weight.grad_added_to_main_grad = True  # see chunked.py
        return *(None if grad is None else grad.to(own.dtype) for grad in grads), grad_weight, None


def _of_own(log_p: Tensor, log_q: Tensor, far: Tensor) -> Tensor:
    return (log_p - log_q - far).mul_(log_p.exp())


def _of_other(log_p: Tensor, log_q: Tensor, far: Tensor) -> Tensor:
    return log_q.exp().sub_(log_p.exp())


_OF_LOGITS = (_of_own, _of_other)


def _log_probabilities(
    contexts: tuple[Tensor, Tensor],
    head: Tensor,
    plan: _Plan,
    rows: slice,
    columns: tuple[int, int],
    sums: list[Tensor],
) -> list[Tensor]:
    """log p and log q of a tile, [R, C] each; `sums`: both logsumexps [T]."""
    tile = plan.tile(rows, *columns, sums[0])
    made = (_TILES.make(hidden[rows], head, tile) for hidden in contexts)
    return [z.sub_(total[rows, None]) for z, total in zip(made, sums, strict=True)]


def _local_state(own: Tensor, other: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
    """[5, T] over this rank's ids: max z, sum of exp(z - max), sum of exp(z - max) * (z - y), max y, sum of
    exp(y - max)."""
    accumulate, operand = dtypes(own)
    state = torch.zeros(5, len(own), dtype=accumulate, device=own.device)
    state[[0, 3]] = torch.finfo(accumulate).min  # stands for "nothing yet", see `tiles.empty_state`
    for left, right in spans(plan.shard.columns, chunked.MAX_TILE_COLUMNS):
        head = weight[left:right].to(operand)
        for first, last in spans(len(own), chunked.tile_rows(own, right - left)):
            rows = slice(first, last)
            tile = plan.tile(rows, left, right, state[0])
            z, y = (_TILES.make(hidden[rows], head, tile) for hidden in (own, other))
            _fold(state[:, rows], z, y)
    return state


def _fold(state: Tensor, z: Tensor, y: Tensor) -> None:
    """Adds a tile to the state [5, R]."""
    top, total, weighted, other_top, other_total = state.unbind()
    new_top = torch.maximum(top, z.amax(1))
    decay = (top - new_top).exp()
    exponentials = (z - new_top[:, None]).exp_()
    weighted.mul_(decay).add_(torch.linalg.vecdot(exponentials, z.sub_(y)))
    total.mul_(decay).add_(exponentials.sum(1))
    top.copy_(new_top)
    new_top = torch.maximum(other_top, y.amax(1))
    other_total.mul_((other_top - new_top).exp()).add_(y.sub_(new_top[:, None]).exp_().sum(1))
    other_top.copy_(new_top)


def _merge(state: Tensor, group: ProcessGroup | None) -> Tensor:
    """One all_gather of the ranks' states [5, T], summed in rank order: every rank gets the same bits."""
    if group is None or get_world_size(group) == 1 or state.shape[1] == 0:
        return state
    states = [torch.empty_like(state) for _ in range(get_world_size(group))]
    all_gather(states, state, group=group)
    merged = torch.zeros_like(state)
    merged[[0, 3]] = torch.stack([part[[0, 3]] for part in states]).amax(0)
    for part in states:
        decay = (part[0] - merged[0]).exp()
        merged[1].add_(decay * part[1])
        merged[2].add_(decay * part[2])
        merged[4].add_((part[3] - merged[3]).exp() * part[4])
    return merged
