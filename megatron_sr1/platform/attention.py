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
    out, lse = _with_spare(query), query.new_empty((len(query) + 1, query.shape[1]), dtype=torch.float32)
    for runs in call.batches:
        parts = _padded(runs, query, key, value)
        found, its_lse = padded_attention(*parts, runs.mask, causal=runs.causal, scale=scale)
        for whole, part in ((out, found), (lse, its_lse)):
            _put(whole, part, runs.query_places)
    return out[:-1], lse[:-1]


def attend_backward(call: AttentionCall, of: Attended, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in the shapes of `attend`."""
    if of.query.is_cuda:
        return varlen_attention_backward(of, _edges(call), causal=call.causal, scale=scale)
    grads = [_with_spare(x).zero_() for x in (of.query, of.key, of.value)]
    for runs in call.batches:
        its_grad, its_out, its_lse = (_taken(x, runs.queries) for x in (of.grad, of.out, of.lse))
        # what fills up queries has probabilities of 0, and so adds nothing to the gradients of keys and values
        its_lse = its_lse.masked_fill_(~runs.real[:, None], FAR)
        padded = Attended(*_padded(runs, of.query, of.key, of.value), its_grad, its_out, its_lse)
        found = padded_attention_backward(padded, runs.mask, causal=runs.causal, scale=scale)
        places = (runs.query_places, runs.key_places, runs.key_places)  # keys that fill up get nothing
        for whole, part, where in zip(grads, found, places, strict=True):
            _put(whole, part, where)
    query, key, value = (x[:-1] for x in grads)
    return query, key, value


def _with_spare(x: Tensor) -> Tensor:
    """For what is written at the places of `x`, and behind it a row for what fills up: to throw that away there is
    quicker than to leave it out."""
    return x.new_empty((len(x) + 1, *x.shape[1:]))


def _put(whole: Tensor, part: Tensor, places: Tensor) -> None:
    """Writes `part` [B, h, n, ...] to its places in `whole` [N + 1, h, ...], what fills up to the last one."""
    whole.index_copy_(0, torch.where(places < 0, len(whole) - 1, places), part.transpose(1, 2).flatten(0, 1))


def _padded(runs: PaddedRuns, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, h, Q, d], [B, g, K, d], [B, g, K, d]."""
    return _taken(query, runs.queries), _taken(key, runs.keys), _taken(value, runs.keys)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """[N, h, ...] at [B, n] -> [B, h, n, ...]. A new tensor; rows are copied whole, which indexing does not."""
    return x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)


def _edges(call: AttentionCall) -> tuple[Tensor, Tensor, int, int]:
    return call.cu_queries, call.cu_keys, call.max_queries, call.max_keys
