"""The back ends of the gated delta rule and of the convolution before it, and which of them runs where.

    torch   plain torch in fp32 (chunked.py, convolution.py): any device
    fla     flash-linear-attention's chunk_gated_delta_rule, and causal-conv1d's causal_conv1d_fn for rows without
            shared prefixes: on a GPU that has them, for bf16

Which one it is depends on what is installed and on the dtype, and is decided here alone. The fla back end was never run
by the tests of this project.

Shapes: T tokens, g key heads of dk channels, each of which serves r value heads of dv channels, C channels, K taps.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sr1.kernels.delta_rule.chunked import chunked_delta_rule
from megatron_sr1.kernels.delta_rule.convolution import convolved
from megatron_sr1.kernels.delta_rule.plan import RowPlan, SegmentLevel

NORM_EPS = 1e-6  # of the length of queries and keys, as in transformers' l2norm


def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, plan: RowPlan) -> Tensor:
    """Outputs [T, g, r, dv] in the dtype of `value`; queries and keys are brought to length 1 first, queries divided by
    the root of dk. States are fp32, begin with 0 at every sequence's start, and go on from a shared prefix's.

    Args:
        query: [T, g, dk].
        key: [T, g, dk].
        value: [T, g, r, dv].
        decay: logarithm of what is left of the state, [T, g, r] fp32, at most 0.
        rate: how much of a correction is written, [T, g, r], between 0 and 1.
        plan: of the row.
    """
    run = _fla_rule if _has_fla(value, "fla") else _torch_rule
    outputs: list[Tensor] = []
    states: Tensor | None = None
    for level in plan.levels:
        q, k, v, g, b = (
            x if level.rows is None else x.index_select(0, level.rows) for x in (query, key, value, decay, rate)
        )
        first = None if level.parents is None or states is None else states.index_select(0, level.parents)
        out, states = run(q, k, v, g, b, level, first)
        outputs.append(out)
    if plan.order is None:
        return outputs[0]
    return torch.cat(outputs).index_select(0, plan.order)


def causal_convolution(x: Tensor, weight: Tensor, plan: RowPlan) -> Tensor:
    """silu of the convolution of x [T, C] with weight [C, K] over each sequence: [T, C] in the dtype of x."""
    if len(plan.levels) == 1 and _has_fla(x, "causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

        # channels must lie side by side where sequences are told apart
        out = causal_conv1d_fn(x[None].transpose(1, 2), weight, seq_idx=plan.segments[None], activation="silu")
        return out.transpose(1, 2)[0]
    return F.silu(convolved(x.float(), weight.float(), plan)).to(x.dtype)


def _torch_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor,
    level: SegmentLevel,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    query, key = unit_queries_and_keys(query, key)
    out, states = chunked_delta_rule(query, key, value.float(), decay, rate.float(), level.lengths, initial)
    return out.to(value.dtype), states


def unit_queries_and_keys(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """[.., dk] each, fp32: of length 1, and queries divided by the root of dk."""
    query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (query.float(), key.float()))
    return query * query.shape[-1] ** -0.5, key


def _fla_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor,
    level: SegmentLevel,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    shape = value.shape  # [T, g, r, dv]
    query, key = (x.repeat_interleave(shape[2], dim=1)[None] for x in (query, key))
    heads: Any = None if initial is None else initial.flatten(1, 2)
    out, states = chunk_gated_delta_rule(
        query,
        key,
        value.flatten(1, 2)[None],
        g=decay.flatten(1, 2)[None],
        beta=rate.flatten(1, 2)[None],
        initial_state=heads,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=level.cu_seqlens,
    )
    return out[0].unflatten(1, shape[1:3]), states.unflatten(1, shape[1:3])


def _has_fla(x: Tensor, package: str) -> bool:
    # nothing says that these kernels add in a fixed order
    fits = x.is_cuda and x.dtype == torch.bfloat16 and not torch.are_deterministic_algorithms_enabled()
    return fits and _is_installed(package)


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None
