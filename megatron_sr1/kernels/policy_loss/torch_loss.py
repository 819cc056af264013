"""The torch back end of fused_stream_loss: any device, float32 and float64, all streams at once.

On the CPU a masked operation on a mask without pattern takes as long as ten products or more. So what clipping holds
is a 0 or 1 in float, and only "has this stream the token", whose runs are long, is a mask.

Shapes: R scored tokens, S streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.types import Clip, KlEstimator, LossInputs


def torch_loss(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], totals [S, 6] in the order of METRICS, gradient [R] of the trainer log-probs; all of its dtype."""
    trainer = inputs.trainer_logprobs.detach()
    weights = inputs.token_weights.to(trainer.dtype)
    ratio = (trainer - (trainer if inputs.old_logprobs is None else inputs.old_logprobs.to(trainer.dtype))).exp_()
    idle = weights == 0  # [S, R]; 0 * infinity is no part of a sum
    own_ratio = ratio.expand_as(weights).masked_fill(idle, 1.0)  # [S, R]
    opposite = -inputs.advantages.to(trainer.dtype)
    value, clipped, dual_clipped = _surrogate(own_ratio, opposite, [stream.clip for stream in inputs.streams])

    held = clipped if dual_clipped is None else torch.maximum(clipped, dual_clipped)
    lambdas = weights.new_tensor([stream.loss_weight for stream in inputs.streams])
    betas = weights.new_tensor([stream.kl_loss_coef for stream in inputs.streams])
    of_ratio = lambdas @ opposite.mul_(weights).mul_(1.0 - held)  # [R] d loss / d ratio
    gradient = (of_ratio * ratio).masked_fill_(of_ratio == 0, 0.0)
    sums = [
        weights.sum(1),
        value.mul_(weights).sum(1),
        _add_kl(inputs, weights, idle, betas, gradient),
        own_ratio.mul_(weights).sum(1),
        clipped.mul_(weights).sum(1),
        weights.new_zeros(len(lambdas)) if dual_clipped is None else dual_clipped.mul_(weights).sum(1),
    ]
    totals = torch.stack(sums, 1)
    coefficients = torch.stack([lambdas, betas], 1)  # of policy and kl
    loss = (coefficients * totals[:, 1:3]).masked_fill_(coefficients == 0, 0.0).sum()
    return loss, totals, gradient


def _surrogate(ratio: Tensor, opposite: Tensor, clips: Sequence[Clip]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Value, and as 0 or 1 what PPO clipping and (None without a bound) dual clipping hold, [S, R] each.

    `opposite` is minus the advantage. Where that is 0 or less, so is the value, and a ceiling of 0 holds nothing.
    """
    unclipped = opposite * ratio
    low = ratio.new_tensor([1.0 - clip.low for clip in clips])[:, None]
    high = ratio.new_tensor([1.0 + clip.high for clip in clips])[:, None]
    bounded = ratio.clamp(low, high).mul_(opposite)
    value = torch.maximum(unclipped, bounded)
    clipped = bounded.gt_(unclipped)
    if all(clip.dual is None for clip in clips):
        return value, clipped, None
    duals = ratio.new_tensor([torch.inf if clip.dual is None else clip.dual for clip in clips])[:, None]
    ceiling = opposite.clamp(min=0.0).mul_(duals).nan_to_num_(nan=0.0, posinf=torch.inf)  # 0 * infinity
    dual_clipped = torch.gt(value, ceiling, out=unclipped)
    return torch.minimum(value, ceiling), clipped, dual_clipped


def _add_kl(inputs: LossInputs, weights: Tensor, idle: Tensor, betas: Tensor, gradient: Tensor) -> Tensor:
    """Sums [S] of w * kl; adds the gradient of beta * w * kl to `gradient` [R]. Each estimator is worked out once."""
    sums = torch.zeros_like(betas)
    if inputs.ref_logprobs is None:
        return sums
    difference = inputs.ref_logprobs.to(gradient.dtype) - inputs.trainer_logprobs.detach()
    users: dict[KlEstimator, list[int]] = {}
    for index, stream in enumerate(inputs.streams):
        users.setdefault(stream.kl_estimator, []).append(index)
    for estimator, rows in users.items():
        kl, slope = _kl_and_slope(difference, estimator)
        own_weights = weights[rows]
        of_kl = betas[rows] @ own_weights  # [R]
        gradient.add_(slope.mul_(of_kl).masked_fill_(of_kl == 0, 0.0))
        sums[rows] = own_weights.mul_(kl).masked_fill_(idle[rows], 0.0).sum(1)
    return sums


def _kl_and_slope(difference: Tensor, estimator: KlEstimator) -> tuple[Tensor, Tensor]:
    """kl_estimate [R] and its derivative in the trainer log-prob; one exponential for both."""
    if estimator == "k1":
        return -difference, torch.ones_like(difference)
    if estimator == "k2":
        return 0.5 * difference.square(), -difference
    growth = difference.expm1()
    return growth - difference, growth.neg_()
