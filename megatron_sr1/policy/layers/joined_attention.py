"""Attention of several calls over the same queries, joined by their log-sum-exp: exact, forward and backward.

With the scores of a query cut into sets i, out_i the attention over set i and lse_i the log-sum-exp of its scores,

    lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

and since a probability is exp(score - lse), the backward of a call, given the joint out and lse in place of its own,
gives the gradients of its own queries, keys and values in the whole (Ring Attention, arXiv 2310.01889;
FlashAttention-2, arXiv 2307.08691, algorithm 2). Keys that several runs see, such as a prompt's, get the sum of their
gradients.

Shapes: Q queries on this rank, K keys of the row, h query heads, g key/value heads, d channels of a head; Nq and Nk
queries and keys of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.packing import AttentionCall
from megatron_sr1.platform.attention import attend, attend_backward
from megatron_sr1.platform.torch_private import Attended


def joined_attention(
    query: Tensor, key: Tensor, value: Tensor, calls: Sequence[AttentionCall], scale: float | None = None
) -> Tensor:
    """query [Q, h, d], key and value [K, g, d] -> [Q, h, d].

    Args:
        calls: see `packing.attention_calls`; the first has every query.
        scale: of the scores; None: 1 / sqrt(d).
    """
    joined: Any = _JoinedAttention.apply(query, key, value, tuple(calls), scale)
    return joined


class _JoinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: tuple[AttentionCall, ...], scale: float | None
    ) -> Tensor:
        assert calls[0].query_rows is None
        (out, lse), *others = [attend(call, *_of(call, query, key, value), scale) for call in calls]
        for call, (more, its_lse) in zip(calls[1:], others, strict=True):
            rows = call.query_rows
            assert rows is not None
            before = lse.index_select(0, rows)
            joint = torch.logaddexp(before, its_lse)
            kept, added = ((part - joint).exp()[..., None] for part in (before, its_lse))
            lse.index_copy_(0, rows, joint)
            out.index_copy_(0, rows, (kept * out.index_select(0, rows)).add_(added * more).to(out.dtype))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        query, key, value, out, lse = ctx.saved_tensors
        found: list[Tensor] = []
        for call in ctx.calls:
            parts = _of(call, query, key, value)
            attended = Attended(*parts, *(_rows(x, call.query_rows) for x in (grad, out, lse)))
            places = ((call.query_rows, True), *[(call.key_rows, call.keys_once)] * 2)
            its_grads = attend_backward(call, attended, ctx.scale)
            if not found:  # the first has every query and key
                found = [
                    part if rows is None else torch.zeros_like(x)
                    for part, x, (rows, _) in zip(its_grads, (query, key, value), places, strict=True)
                ]
            for whole, part, (rows, once) in zip(found, its_grads, places, strict=True):
                if whole is not part:
                    _add(whole, part, rows, once)
        return (*found, None, None)


def _of(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[Nq, h, d], [Nk, g, d], [Nk, g, d]."""
    return _rows(query, call.query_rows), _rows(key, call.key_rows), _rows(value, call.key_rows)


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _add(whole: Tensor, part: Tensor, rows: Tensor, once: bool) -> None:
    """`part` at `rows` of `whole`; `once`: none of them comes again, which is quicker."""
    if once:
        whole.index_copy_(0, rows, whole.index_select(0, rows).add_(part))
    else:
        whole.index_add_(0, rows, part)
