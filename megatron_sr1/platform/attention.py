"""One call of attention, by the kernel of the device: runs as they are on a GPU, padded batches of them on a CPU.

Shapes: Nq queries and Nk keys of the call, run after run; h query heads, g key/value heads, d channels of a head;
B, Q, K see `packing.PaddedRuns`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sr1.packing import AttentionCall, PaddedRuns
from megatron_sr1.platform.torch_private import (
    Attended,
    padded_attention,
    padded_attention_backward,
    varlen_attention,
    varlen_attention_backward,
)

FAR = 1e30  # the log-sum-exp of a query whose probabilities are all 0


def attend(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """query [Nq, h, d], key and value [Nk, g, d] -> [Nq, h, d] and the log-sum-exp of the scores, [Nq, h] fp32."""
    if query.is_cuda:
        return varlen_attention(query, key, value, _edges(call), causal=call.causal, scale=scale)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    for runs in call.batches:
        parts = _padded(runs, query, key, value)
        found, its_lse = padded_attention(*parts, runs.mask, causal=runs.causal, scale=scale)
        for whole, part in ((out, found), (lse, its_lse)):
            _put(whole, part, runs.query_places)
    return out, lse


def attend_backward(call: AttentionCall, of: Attended, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in the shapes of `attend`."""
    if of.query.is_cuda:
        return varlen_attention_backward(of, _edges(call), causal=call.causal, scale=scale)
    grads = torch.zeros_like(of.query), torch.zeros_like(of.key), torch.zeros_like(of.value)
    for runs in call.batches:
        fills = ~runs.real[:, None]  # [B, 1, Q]
        its_grad, its_out = (x[runs.queries].transpose(1, 2) for x in (of.grad, of.out))
        its_grad = its_grad.masked_fill(fills[..., None], 0.0)
        its_lse = of.lse[runs.queries].transpose(1, 2).masked_fill(fills, FAR)
        padded = Attended(*_padded(runs, of.query, of.key, of.value), its_grad, its_out, its_lse)
        found = padded_attention_backward(padded, runs.mask, causal=runs.causal, scale=scale)
        places = (runs.query_places, runs.key_places, runs.key_places)  # keys that fill up get nothing
        for whole, part, where in zip(grads, found, places, strict=True):
            _put(whole, part, where)
    return grads


def _put(whole: Tensor, part: Tensor, places: tuple[Tensor, Tensor]) -> None:
    """Writes what is real of `part` [B, h, n, ...] to its places in `whole` [N, h, ...]."""
    chosen, rows = places
    whole[rows] = part.transpose(1, 2).flatten(0, 1)[chosen]


def _padded(runs: PaddedRuns, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, h, Q, d], [B, g, K, d], [B, g, K, d]."""
    places = (runs.queries, runs.keys, runs.keys)
    query, key, value = (x[p].transpose(1, 2) for x, p in zip((query, key, value), places, strict=True))
    return query, key, value


def _edges(call: AttentionCall) -> tuple[Tensor, Tensor, int, int]:
    return call.cu_queries, call.cu_keys, call.max_queries, call.max_keys
