"""The policy loss in one pass: loss, metrics and gradient of `megatron_sr1.objective.stream_loss`, which is the
readable reference.

    L = sum_s  lambda_s * sum_r w[s,r] * surrogate(A[s,r], ratio[r])  +  beta_s * sum_r w[s,r] * kl_s(r)
             - eta_s * sum_r w[s,r] * H[r]

    dL/dlogp[r] = ratio[r] * sum_s lambda_s * w[s,r] * (-A[s,r]) * [no clipping holds (s,r)]
                + sum_s beta_s * w[s,r] * kl_s'(r)

    kl' = 1 (k1),  -d (k2),  -(e^d - 1) (k3),   d = log pi_ref - log pi

The gradient needs nothing but the inputs, so forward computes it and keeps it, one [R] tensor; backward multiplies it
by the incoming scalar. Automatic differentiation of the reference keeps about six such tensors for each stream. The
entropy bonus is linear in H, so it is the reference's own and added behind.

Shapes: R scored tokens of the micro-batch, S streams.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_sr1.kernels.policy_loss.torch_loss import torch_loss
from megatron_sr1.objective.losses import check_inputs, entropy_bonus
from megatron_sr1.types import KlEstimator, LossInputs, RewardStream

LossBackend = Literal["auto", "torch", "triton"]
METRICS = ("weight", "policy", "kl", "ratio_mean", "clip_fraction", "dual_clip_fraction")
_Compute = Callable[[LossInputs], tuple[Tensor, Tensor, Tensor]]  # -> loss [], totals [S, 6], gradient [R]


def is_fused(stream: RewardStream) -> bool:
    """Whether the fused loss computes what the stream asks for."""
    return stream.surrogate == "ppo" and stream.ratio == "token"


def fused_stream_loss(inputs: LossInputs, *, backend: LossBackend = "auto") -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss of one micro-batch: what `stream_loss` returns, under the same names.

    The numbers are those of the reference to rounding, in the dtype of the trainer log-probs, whatever the dtype of
    the others. They part only where the reference is undefined: 0 times infinity, which it gives as nan, is 0 here for
    a token of weight 0, for a coefficient of 0, and for the gradient of a token that clipping holds at an infinite
    ratio. A nan in a token that counts comes out as nan. Results are the same bits in every run on one machine.

    Args:
        inputs: as for `stream_loss`.
        backend: "torch" works anywhere; "triton" is two kernel launches, in float32; "auto" is "triton" for float32
            on a GPU where Triton is installed, else "torch".

    Returns:
        The loss, a scalar, and the detached scalars `loss/<stream>/<name>` for each of METRICS, and of the bonuses;
        `stream_loss` says what they are. Those of METRICS share the memory of one [S, 6] tensor. The loss can be
        differentiated once.

    Raises:
        ValueError: what `stream_loss` refuses, an unknown KL estimator or backend, or a backend that cannot take
            these tensors.
    """
    check_inputs(inputs)
    for stream in inputs.streams:
        if not is_fused(stream):
            raise ValueError(
                f"streams: {stream.name!r} has surrogate={stream.surrogate!r} and ratio={stream.ratio!r}; the fused "
                "loss is ppo of tokens. Use stream_loss."
            )
        if stream.kl_estimator not in get_args(KlEstimator):
            raise ValueError(
                f"streams: {stream.name!r} has kl_estimator={stream.kl_estimator!r}; "
                f"it must be one of {', '.join(get_args(KlEstimator))}."
            )
    loss, totals = _FusedLoss.apply(inputs.trainer_logprobs, inputs, _choose(backend, inputs.trainer_logprobs))
    names = (f"loss/{stream.name}/{metric}" for stream in inputs.streams for metric in METRICS)
    metrics = dict(zip(names, totals.flatten().unbind(), strict=True))
    bonus, bonuses = entropy_bonus(inputs)
    return (loss if bonus is None else loss - bonus), {**metrics, **bonuses}


class _FusedLoss(torch.autograd.Function):
    """Keeps the gradient [R] and nothing else."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, trainer_logprobs: Tensor, inputs: LossInputs, compute: _Compute
    ) -> tuple[Tensor, Tensor]:
        loss, totals, gradient = compute(inputs)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(totals)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None


def _choose(backend: LossBackend, logprobs: Tensor) -> _Compute:
    if backend not in get_args(LossBackend):
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(get_args(LossBackend))}.")
    if backend == "auto":
        can_triton = logprobs.is_cuda and logprobs.dtype == torch.float32 and find_spec("triton") is not None
        backend = "triton" if can_triton else "torch"
    if backend == "torch":
        return torch_loss
    # Here, not above: Triton takes a second to import, and a machine without a GPU need not have it.
    from megatron_sr1.kernels.policy_loss.triton_loss import triton_loss

    return triton_loss
