"""The driver of linear_logprob: tiles of logits, folded into four numbers per token, by interchangeable operations.

Shapes: T tokens, H hidden size, V columns of this rank's shard without padding, C columns and R rows of a tile.

The vocabulary is the outer loop: a tile of the head is read (and, where needed, cast) once, and its weight gradient is
summed over all tokens before it is rounded once. With a small vocabulary this is plain chunking over tokens.

Forward folds a tile into the running (max, sum of exp, z of the target, sum of exp * shifted z) [T] each; ranks merge
theirs in rank order. Backward recomputes a tile with the same operations (or finds it among the few that were kept),
then

    dL/dlogits_j = [g_logprob * (1[j = target] - p_j) - g_entropy * p_j * (log p_j + entropy)] / temperature

Memory beyond the inputs, at its peak, in elements of the accumulation dtype, with C = MAX_TILE_COLUMNS or V if that is
less, and R*C the larger of the tile elements of the device and MIN_TILE_ROWS * C (or T*C if that is less):

    forward    [T] vectors; tiles of R*C: 4 with entropy and 2 without (torch), 2 (triton), and in place of tiles
               4T per 4096 columns (fused)
    backward   T*H and C*H, the accumulators of both gradients; tiles of R*C: 2 (torch), 1 and one of the hidden
               states' dtype (triton, fused); at most KEPT_ELEMENTS logits since forward; the gradients themselves,
               T*H and V*H in the inputs' dtype

On the CPU, below float32, also the cast factors of a product: C*H of the head and R*H of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup, all_gather, get_world_size

from megatron_sr1.kernels.linear_logprob.tiles import (
    Backend,
    RowGradients,
    Rows,
    Tile,
    VocabShard,
    add_product,
    dtypes,
    empty_state,
    spans,
)

MAX_TILE_COLUMNS = 8192
# Logits of one tile: on the CPU they should stay in the caches, an accelerator needs many rows to be busy (256 MiB).
TILE_ELEMENTS_CPU = 2**19
TILE_ELEMENTS_ACCELERATOR = 2**26
# Logits that wait for backward, per call: at most this many (16 MiB in float32), in whole tiles, whatever T and V are.
# It spares a small model the second making of its logits, a quarter of all the work, and is nothing to a large one.
KEPT_ELEMENTS = 2**22
MIN_TILE_ROWS = 256  # fewer would read the head too often for each product


_Tiles = dict[tuple[int, int], Tensor]  # first column and first row of a tile -> its logits


@dataclass(frozen=True)
class Plan:
    """How a call is computed: everything but the tensors that autograd follows."""

    shard: VocabShard
    backend: Backend
    entropy: bool
    rounded: bool  # products are rounded to bfloat16 before anything is done with them
    grad_rows: Tensor | None = None  # [G] the only rows that take part in backward, ascending; None: all
    accumulate_into: Tensor | None = None  # [V_local, H] receives the gradient of the head
    top: bool = False  # also say which targets are the likeliest; without a graph alone


def chunked_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, inverse_temperature: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs [T] and, where asked for, entropy [T] and whether no id is likelier, [T] bool; linear_logprob has
    checked the arguments, nothing is ignored."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        assert not plan.top, "linear_logprob has refused it"
        return *_ChunkedLogProb.apply(hidden, weight, targets, inverse_temperature, plan), None
    logprobs, nats, _, is_top = _forward(hidden, weight, targets, inverse_temperature, plan)
    return logprobs, nats, is_top if plan.top else None


class _ChunkedLogProb(torch.autograd.Function):
    """Keeps its inputs, logsumexp and entropy [T], and no more than KEPT_ELEMENTS logits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        inverse_temperature: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:
        kept: _Tiles = {}
        # Tiles are kept by their place among all rows; a backward over chosen rows has other tiles.
        keep = kept if plan.grad_rows is None else None
        logprobs, nats, logsumexp, _ = _forward(hidden, weight, targets, inverse_temperature, plan, keep)
        ctx.save_for_backward(hidden, weight, targets, inverse_temperature, logsumexp, nats, *kept.values())
        ctx.kept = tuple(kept)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return logprobs, nats

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, inverse_temperature, logsumexp, nats, *tiles = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 5
        plan: Plan = ctx.plan
        rows = Rows(targets - plan.shard.start, inverse_temperature)
        gradients = _row_gradients(grad_logprobs, grad_entropy, nats, inverse_temperature)
        kept = dict(zip(ctx.kept, tiles, strict=True))
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        chosen = plan.grad_rows
        if chosen is None:
            wanted = _backward(hidden, weight, rows, logsumexp, gradients, plan, kept, needs)
        else:
            parts = (hidden[chosen], weight, rows.select(chosen), logsumexp[chosen], gradients.select(chosen))
            grad_part, grad_weight = _backward(*parts, plan, {}, needs)
            grad_hidden = None if grad_part is None else torch.zeros_like(hidden).index_copy_(0, chosen, grad_part)
            wanted = grad_hidden, grad_weight
        return *wanted, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor | None,
    plan: Plan,
    kept: _Tiles | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probs, entropy (or None) and logsumexp of the scaled logits, [T] each, in the accumulation dtype; and whether
    the target's logit is the largest, [T] bool. Fills `kept` with the first tiles, as far as KEPT_ELEMENTS goes."""
    rows = Rows(targets - plan.shard.start, inverse_temperature)
    if plan.backend.statistics is None:
        state = _local_state(hidden, weight, rows, plan, kept)
    else:
        state = plan.backend.statistics(hidden, weight, rows, plan.shard, plan.entropy, plan.rounded)
    top, total, z_target, weighted = _merge(state, plan.shard.group).unbind()
    log_total = total.log()
    # Both terms are <= 0 (total holds exp(0)), so no log-prob can be above 0.
    logprobs = (z_target - top) - log_total
    # both are of the same tiles, so the largest logit equals itself to the bit
    return logprobs, log_total - weighted / total if plan.entropy else None, top + log_total, z_target == top


def _local_state(hidden: Tensor, weight: Tensor, rows: Rows, plan: Plan, kept: _Tiles | None) -> Tensor:
    """The state [4, T] over this rank's ids."""
    accumulate, operand = dtypes(hidden)
    state = empty_state(len(hidden), accumulate, hidden.device)
    room = KEPT_ELEMENTS
    for left, right in spans(plan.shard.columns, MAX_TILE_COLUMNS):
        head = weight[left:right].to(operand)
        for first, last in spans(len(hidden), tile_rows(hidden, right - left)):
            tile = _tile(rows, plan, (first, last), (left, right))
            z = plan.backend.tiles.make(hidden[first:last], head, tile)
            plan.backend.tiles.fold(state[:, first:last], z, tile, plan.entropy)
            room -= z.numel()
            if kept is not None and room >= 0:
                kept[left, first] = z
    return state


def _merge(state: Tensor, group: ProcessGroup | None) -> Tensor:
    """One all_gather of the ranks' states [4, T], summed in rank order: every rank gets the same bits."""
    if group is None or get_world_size(group) == 1 or state.shape[1] == 0:
        return state
    states = [torch.empty_like(state) for _ in range(get_world_size(group))]
    all_gather(states, state, group=group)
    top = torch.stack([part[0] for part in states]).amax(0)
    z_target = torch.stack([part[2] for part in states]).amax(0)
    total, weighted = torch.zeros_like(top), torch.zeros_like(top)
    for part_top, part_total, _, part_weighted in states:
        drop = part_top - top
        decay = drop.exp()
        total.add_(decay * part_total)
        weighted.add_(decay * (part_weighted + drop * part_total))
    return torch.stack([top, total, z_target, weighted])


def _row_gradients(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, nats: Tensor | None, inverse_temperature: Tensor | None
) -> RowGradients:
    scale = 1.0 if inverse_temperature is None else inverse_temperature
    if grad_entropy is None:
        at_target = grad_logprobs * scale
        return RowGradients(at_target, at_target, None)
    at_target = torch.zeros_like(grad_entropy) if grad_logprobs is None else grad_logprobs * scale
    of_p_log_p = grad_entropy * scale
    return RowGradients(at_target, at_target + of_p_log_p * nats, of_p_log_p)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    logsumexp: Tensor,
    gradients: RowGradients,
    plan: Plan,
    kept: _Tiles,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden [T, H] (this rank's part) and weight [V_local, H], each only where needed."""
    accumulate, operand = dtypes(hidden)
    grad_hidden = torch.zeros_like(hidden, dtype=accumulate) if needs[0] else None
    into = plan.accumulate_into if needs[1] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None  # padding stays 0
    for left, right in spans(plan.shard.columns, MAX_TILE_COLUMNS):
        head = weight[left:right].to(operand)
        grad_head = None
        if needs[1]:
            grad_head = torch.zeros_like(head, dtype=accumulate) if into is None else into[left:right]
        for first, last in spans(len(hidden), tile_rows(hidden, right - left)):
            tile = _tile(rows, plan, (first, last), (left, right))
            z = kept.get((left, first))
            overwrite = z is None  # a kept tile must survive: backward may run again
            if z is None:
                z = plan.backend.tiles.make(hidden[first:last], head, tile)
            part = gradients.part(first, last)
            grad_z = plan.backend.tiles.gradient(z, logsumexp[first:last], tile, part, operand, overwrite)
            if grad_hidden is not None:
                add_product(grad_hidden[first:last], grad_z, head)
            if grad_head is not None:
                add_product(grad_head, grad_z.t(), hidden[first:last].to(operand))
            del z, grad_z  # before the next tile is made: both would add to the peak
        if grad_weight is not None and into is None:
            grad_weight[left:right] = grad_head
    if into is not None:
        # What Megatron's DDP reads when autograd delivers the gradient, which is zeros: it must not be added again.
        weight.grad_added_to_main_grad = True
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def _tile(rows: Rows, plan: Plan, row_span: tuple[int, int], column_span: tuple[int, int]) -> Tile:
    part = slice(*row_span)
    return Tile(
        targets=rows.targets[part] - column_span[0],
        inverse_temperature=None if rows.inverse_temperature is None else rows.inverse_temperature[part],
        bias=plan.shard.bias_of(*column_span),
        rounded=plan.rounded,
    )


def tile_rows(hidden: Tensor, columns: int) -> int:
    """Of a tile of that many columns."""
    elements = TILE_ELEMENTS_ACCELERATOR if hidden.is_cuda else TILE_ELEMENTS_CPU
    return max(MIN_TILE_ROWS, elements // columns)
