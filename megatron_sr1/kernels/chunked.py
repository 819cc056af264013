"""The torch back end of linear_logprob: tiles of logits, folded into four numbers per token.

Shapes: T tokens, H hidden size, V columns of this rank's shard without padding, C columns and R rows of a tile.

The vocabulary is the outer loop: a tile of the head is read (and, where needed, cast) once, and its weight gradient is
summed over all tokens before it is rounded once. With a small vocabulary this is plain chunking over tokens.

Forward folds a tile into the running (max, sum of exp, z of the target, sum of exp * shifted z) [T] each; ranks merge
theirs in rank order. Backward recomputes a tile with the same operations (or finds it among the few that were kept),
then

    dL/dlogits_j = [g_logprob * (1[j = target] - p_j) - g_entropy * p_j * (log p_j + entropy)] / temperature
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed import ProcessGroup, all_gather, get_world_size

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
class VocabShard:
    """The part of the vocabulary that this rank holds: ids [start, start + columns)."""

    start: int
    columns: int  # padding not counted
    group: ProcessGroup | None  # the ranks that share the vocabulary
    bias: Tensor | None = None  # [V] added to the logits, in the accumulation dtype; no gradient flows to it

    def bias_of(self, left: int, right: int) -> Tensor | None:
        return None if self.bias is None else self.bias[left:right]


@dataclass(frozen=True)
class _Rows:
    """What a tile needs to know about its tokens, besides their hidden states."""

    targets: Tensor  # [T] id minus the shard's start; outside the shard it lies outside [0, V)
    inverse_temperature: Tensor | None  # [T]; None: 1


@dataclass(frozen=True)
class _RowGradients:
    """Coefficients, all [T], of d_logits = at_target * 1[j = target] - p * (of_p + of_p_log_p * log p)."""

    at_target: Tensor
    of_p: Tensor
    of_p_log_p: Tensor | None  # None: no gradient of the entropy


def chunked_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor | None,
    shard: VocabShard,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [T] and, where asked for, entropy [T]; linear_logprob has checked the arguments, nothing is ignored."""
    arguments = (hidden, weight, targets, inverse_temperature, shard, entropy)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedLogProb.apply(*arguments)
    return _forward(*arguments)[:2]


class _ChunkedLogProb(torch.autograd.Function):
    """Keeps its inputs, logsumexp and entropy [T], and no more than KEPT_ELEMENTS logits."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        inverse_temperature: Tensor | None,
        shard: VocabShard,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        kept: _Tiles = {}
        logprobs, nats, logsumexp = _forward(hidden, weight, targets, inverse_temperature, shard, entropy, kept)
        ctx.save_for_backward(hidden, weight, targets, inverse_temperature, logsumexp, nats, *kept.values())
        ctx.kept = tuple(kept)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        return logprobs, nats

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, inverse_temperature, logsumexp, nats, *tiles = ctx.saved_tensors
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        rows = _Rows(targets - ctx.shard.start, inverse_temperature)
        gradients = _row_gradients(grad_logprobs, grad_entropy, nats, inverse_temperature)
        kept = dict(zip(ctx.kept, tiles, strict=True))
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        wanted = _backward(hidden, weight, rows, logsumexp, gradients, ctx.shard, kept, needs)
        return *wanted, None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inverse_temperature: Tensor | None,
    shard: VocabShard,
    entropy: bool,
    kept: _Tiles | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probs, entropy (or None) and logsumexp of the scaled logits, [T] each, in the accumulation dtype.
    Fills `kept` with the first tiles, as far as KEPT_ELEMENTS goes."""
    rows = _Rows(targets - shard.start, inverse_temperature)
    state = _merge(_local_state(hidden, weight, rows, shard, entropy, kept), shard.group)
    top, total, z_target, weighted = state.unbind()
    log_total = total.log()
    # Both terms are <= 0 (total holds exp(0)), so no log-prob can be above 0.
    logprobs = (z_target - top) - log_total
    return logprobs, log_total - weighted / total if entropy else None, top + log_total


def _local_state(
    hidden: Tensor, weight: Tensor, rows: _Rows, shard: VocabShard, entropy: bool, kept: _Tiles | None
) -> Tensor:
    """[4, T]: max, sum of exp(z - max), z of the target, sum of exp(z - max) * (z - max), over this rank's ids."""
    accumulate, operand = _dtypes(hidden)
    state = torch.zeros(4, len(hidden), dtype=accumulate, device=hidden.device)
    # The smallest number stands for "nothing yet": unlike -inf it can be subtracted from itself.
    state[0].fill_(torch.finfo(accumulate).min)
    state[2].fill_(torch.finfo(accumulate).min)
    room = KEPT_ELEMENTS
    for left, right in _spans(shard.columns, MAX_TILE_COLUMNS):
        tile = weight[left:right].to(operand)
        for first, last in _spans(len(hidden), _tile_rows(hidden, right - left)):
            z = _logits(hidden[first:last], tile, shard.bias_of(left, right), rows.inverse_temperature, first)
            _fold(state[:, first:last], z, rows.targets[first:last] - left, entropy)
            room -= z.numel()
            if kept is not None and room >= 0:
                kept[left, first] = z
    return state


def _fold(state: Tensor, z: Tensor, targets: Tensor, entropy: bool) -> None:
    """Adds a tile [R, C] to the state [4, R]."""
    top, total, z_target, weighted = state.unbind()
    held, index = _held(targets, z.shape[1])
    z_target.copy_(torch.where(held, z.gather(1, index).squeeze(1), z_target))
    new_top = torch.maximum(top, z.amax(1))
    shifted = z - new_top.unsqueeze(1)
    drop = top - new_top
    decay = drop.exp()
    if entropy:
        exponentials = shifted.exp()
        weighted.copy_(decay * (weighted + drop * total) + torch.linalg.vecdot(exponentials, shifted))
    else:
        exponentials = shifted.exp_()
    total.mul_(decay).add_(exponentials.sum(1))
    top.copy_(new_top)


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
) -> _RowGradients:
    scale = 1.0 if inverse_temperature is None else inverse_temperature
    if grad_entropy is None:
        at_target = grad_logprobs * scale
        return _RowGradients(at_target, at_target, None)
    at_target = torch.zeros_like(grad_entropy) if grad_logprobs is None else grad_logprobs * scale
    of_p_log_p = grad_entropy * scale
    return _RowGradients(at_target, at_target + of_p_log_p * nats, of_p_log_p)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    rows: _Rows,
    logsumexp: Tensor,
    gradients: _RowGradients,
    shard: VocabShard,
    kept: _Tiles,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden [T, H] (this rank's part) and weight [V_local, H], each only where needed."""
    accumulate, operand = _dtypes(hidden)
    grad_hidden = torch.zeros_like(hidden, dtype=accumulate) if needs[0] else None
    grad_weight = torch.zeros_like(weight) if needs[1] else None  # padding stays 0
    for left, right in _spans(shard.columns, MAX_TILE_COLUMNS):
        tile = weight[left:right].to(operand)
        grad_tile = torch.zeros_like(tile, dtype=accumulate) if needs[1] else None
        for first, last in _spans(len(hidden), _tile_rows(hidden, right - left)):
            z = kept.get((left, first))
            if z is None:
                z = _logits(hidden[first:last], tile, shard.bias_of(left, right), rows.inverse_temperature, first)
            log_p = z - logsumexp[first:last].unsqueeze(1)  # not in place: backward may run again
            grad_z = _logit_gradients(log_p, rows.targets[first:last] - left, gradients, first).to(operand)
            if grad_hidden is not None:
                _add_product(grad_hidden[first:last], grad_z, tile)
            if grad_tile is not None:
                _add_product(grad_tile, grad_z.t(), hidden[first:last].to(operand))
        if grad_weight is not None:
            grad_weight[left:right] = grad_tile
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight


def _logit_gradients(log_p: Tensor, targets: Tensor, gradients: _RowGradients, first: int) -> Tensor:
    """Gradient [R, C] of the logits, from their log-probabilities [R, C], which it overwrites."""
    part = slice(first, first + len(log_p))
    of_p = gradients.of_p[part].unsqueeze(1)
    if gradients.of_p_log_p is None:
        grad_z = log_p.exp_().mul_(-of_p)
    else:
        p = log_p.exp()
        grad_z = log_p.mul_(gradients.of_p_log_p[part].unsqueeze(1)).add_(of_p).mul_(p).neg_()
    held, index = _held(targets, log_p.shape[1])
    return grad_z.scatter_add_(1, index, (gradients.at_target[part] * held).unsqueeze(1))


def _logits(
    hidden: Tensor, tile: Tensor, bias: Tensor | None, inverse_temperature: Tensor | None, first: int
) -> Tensor:
    """z = (hidden @ tile.T + bias) / temperature, [R, C] in the accumulation dtype; `first` is the row of hidden[0]."""
    accumulate, operand = _dtypes(hidden)
    z = _product(hidden.to(operand), tile.t(), accumulate)
    if bias is not None:
        z.add_(bias)
    if inverse_temperature is not None:
        z.mul_(inverse_temperature[first : first + len(z)].unsqueeze(1))
    return z


def _held(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which targets [R] lie in this tile, and an index [R, 1] that is valid for all of them."""
    return (targets >= 0) & (targets < columns), targets.clamp(0, columns - 1).unsqueeze(1)


def _dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(accumulation dtype, dtype of the factors of a product). Rounding logits to bfloat16 costs up to 0.05 nats a
    token, so products of low-precision factors have float32 results; the CPU has no such product, so it casts."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    return accumulate, hidden.dtype if hidden.is_cuda else accumulate


def _product(left: Tensor, right: Tensor, accumulate: torch.dtype) -> Tensor:
    return left @ right if left.dtype == accumulate else torch.mm(left, right, out_dtype=accumulate)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == into.dtype:
        into.addmm_(left, right)
    else:
        into.add_(_product(left, right, into.dtype))


def _tile_rows(hidden: Tensor, columns: int) -> int:
    elements = TILE_ELEMENTS_ACCELERATOR if hidden.is_cuda else TILE_ELEMENTS_CPU
    return max(MIN_TILE_ROWS, elements // columns)


def _spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)
