"""The gated delta rule in plain torch, chunk by chunk: any device, fp32.

With decay a_t = exp(g_t) and learning rate b_t the state S [dk, dv] of a head and its output are

    S_t = a_t S_{t-1} + k_t (b_t (v_t - a_t S_{t-1}^T k_t))^T        o_t = S_t^T q_t

(Gated Delta Networks, Yang et al., arXiv 2412.06464, equation 10). For a chunk of C tokens that starts with state S,
with G_t the sum of g from the chunk's start to t, the corrections u_t = b_t (...) are the solution of the triangular

    (I + L) U = b V - b e^G K S        L_tj = b_t e^(G_t - G_j) k_t k_j for j < t

so both parts of the right side are solved for in all chunks at once; what is left to do one after the other is

    U = U_v - U_k S        O = e^G Q S + (Q K^T * e^(G_t - G_j), j <= t) U        S' = e^(G_C) S + (e^(G_C - G) K)^T U

(ibid., section 3.3; DeltaNet, arXiv 2406.06484, section 3.2).

Shapes: T tokens, N segments, n chunks of C = 64 tokens, g key heads of dk channels, each of which serves r value heads
of dv channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class _Chunks:
    """Segments cut into chunks: the first of each segment, longest segment first, then the second of each, and so on.
    So each step of the scan is a run of chunks, and the segments that end drop off behind."""

    index: Tensor  # [n * C] int64: the token, T for what fills up the last chunk of a segment
    places: Tensor  # [T] int64: of each token in `index`
    active: tuple[int, ...]  # of each step of the scan: segments that have a chunk in it
    order: Tensor  # [N] int64: the segments, longest first
    inverse: Tensor  # [N] int64: where each is in `order`


def chunked_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor,
    lengths: Sequence[int],
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [T, g, r, dv] and the states [N, g, r, dk, dv] that the segments end with.

    Args:
        query: [T, g, dk], scaled as the output is to be.
        key: [T, g, dk].
        value: [T, g, r, dv].
        decay: g_t, [T, g, r], at most 0.
        rate: b_t, [T, g, r].
        lengths: of the N segments, none of which is empty.
        initial: the states that they begin with, [N, g, r, dk, dv]; None: 0.
    """
    chunks = _cut(lengths, query.device)
    q, k = (_gathered(x, chunks).transpose(1, 2).unsqueeze(2) for x in (query, key))  # [n, g, 1, C, dk]
    v = _gathered(value, chunks).permute(0, 2, 3, 1, 4)  # [n, g, r, C, dv]
    b = _gathered(rate, chunks).permute(0, 2, 3, 1)[..., None]  # [n, g, r, C, 1]
    total = _gathered(decay, chunks).permute(0, 2, 3, 1).cumsum(-1)  # G: [n, g, r, C]
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1)
    between = (total[..., None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()  # [n, g, r, C, C]
    since, until = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]  # [n, g, r, C, 1]
    system = b * (k @ k.mT) * between
    sides = torch.cat([b * v, b * since * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    of_values, of_keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    reads, writes, scores = since * q, (until * k).mT, (q @ k.mT) * between
    faded = since[..., -1:, :]  # [n, g, r, 1, 1]

    if initial is None:
        state = v.new_zeros(len(lengths), *v.shape[1:3], k.shape[-1], v.shape[-1])
    else:
        state = initial[chunks.order]
    outputs, ended, start = [], [], 0
    for number in chunks.active:
        if number < len(state):
            ended.append(state[number:])
            state = state[:number]
        step = slice(start, start + number)
        corrected = of_values[step] - of_keys[step] @ state
        outputs.append(reads[step] @ state + scores[step] @ corrected)
        state = faded[step] * state + writes[step] @ corrected
        start += number
    states = torch.cat([state, *reversed(ended)])[chunks.inverse]
    out = torch.cat(outputs).permute(0, 3, 1, 2, 4).flatten(0, 1)  # [n * C, g, r, dv]
    return out.index_select(0, chunks.places), states


def _gathered(x: Tensor, chunks: _Chunks) -> Tensor:
    """[T, ...] -> [n, C, ...], 0 in what fills up."""
    filled = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return filled.index_select(0, chunks.index).unflatten(0, (-1, CHUNK))


def _cut(lengths: Sequence[int], device: torch.device) -> _Chunks:
    assert lengths and min(lengths) > 0, lengths
    size = torch.tensor(lengths)
    order = torch.argsort(size, descending=True, stable=True)
    first = (size.cumsum(0) - size)[order]
    size = size[order]
    counts = -(-size // CHUNK)
    steps = torch.arange(int(counts[0]))
    has = steps[:, None] < counts  # [steps, N]
    offset = (steps[:, None] * CHUNK).expand_as(has)[has]  # [n], of a chunk in its segment
    within = offset[:, None] + torch.arange(CHUNK)  # [n, C]
    real = within < size.expand_as(has)[has][:, None]
    tokens = (first.expand_as(has)[has][:, None] + within)[real]
    index = torch.full(within.shape, sum(lengths))
    index[real] = tokens
    places = torch.empty(sum(lengths), dtype=torch.int64)
    places[tokens] = torch.nonzero(real.flatten()).squeeze(1)
    active = tuple(has.sum(1).tolist())
    return _Chunks(
        index.flatten().to(device), places.to(device), active, order.to(device), torch.argsort(order).to(device)
    )
