"""Sequences that go on from states that somebody keeps, token by token or many tokens at once: for an engine on a CPU.

Shapes: N sequences, T tokens of all of them, C channels of the convolution with K taps, g key heads of dk channels,
each of which serves r value heads of dv channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.kernels.delta_rule.backends import causal_convolution, unit_queries_and_keys
from megatron_sr1.kernels.delta_rule.chunked import chunked_delta_rule
from megatron_sr1.kernels.delta_rule.plan import row_plan


def continued_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, lengths: Sequence[int], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [T, g, r, dv] and the states after them, all fp32.

    Args:
        query: [T, g, dk], as `gated_delta_rule` has them; likewise key, value, decay and rate.
        lengths: of the sequences, whose tokens lie one sequence after the other.
        states: that they go on from, [N, g, r, dk, dv].
    """
    query, key = unit_queries_and_keys(query, key)
    if max(lengths) > 1:
        return chunked_delta_rule(query, key, value.float(), decay, rate.float(), lengths, states)
    faded = decay.exp()[..., None, None] * states
    keys = key[:, :, None, :, None]  # [N, g, 1, dk, 1]
    corrected = rate.float()[..., None] * (value.float() - (faded * keys).sum(-2))
    states = faded + keys * corrected[..., None, :]
    return (states * query[:, :, None, :, None]).sum(-2), states


def continued_convolution(x: Tensor, weight: Tensor, lengths: Sequence[int], before: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_convolution` of x [T, C], and what the next tokens need of it, [N, K - 1, C].

    Args:
        weight: [C, K].
        lengths: see `continued_rule`.
        before: the last K - 1 tokens of each sequence so far, 0 where it has not begun: [N, K - 1, C].
    """
    earlier = before.shape[1]
    parts = [torch.cat(pair) for pair in zip(before.unbind(), x.split(list(lengths)), strict=True)]
    edges = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).int()
    row = causal_convolution(torch.cat(parts), weight, row_plan(edges, [-1] * len(parts), weight.shape[1]))
    own = [part[earlier:] for part in row.split([len(part) for part in parts])]
    return torch.cat(own), torch.stack([part[len(part) - earlier :] for part in parts])
