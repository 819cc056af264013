"""The policy loss and the supervised loss: pure functions of tensors.

    L = sum_s  lambda_s * sum_r w[s,r] * surrogate(A[s,r], ratio[r])  +  beta_s * sum_r w[s,r] * kl(r)
                                                                      -  eta_s * sum_r w[s,r] * H[r]

with ratio = pi / pi_old and H the entropy of the token's whole distribution. Sources: Vision-SR1, arXiv 2508.19652, eq.
7-9 (one policy and one KL term per stream, added only at the end); the surrogates, `surrogates.py`; KL estimators,
http://joschu.net/blog/kl-approx.html; the entropy bonus, A3C, arXiv 1602.01783, section 4. The KL term carries beta_s
only, and the bonus eta_s (`entropy_coef`): lambda_s does not multiply them. Where the KL is in the reward, beta_s is 0
here.

Shape legend: R scored tokens of the micro-batch, S streams. Log-probs are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_sr1.objective.surrogates import log_ratio, surrogate
from megatron_sr1.types import KlEstimator, LossInputs


def stream_loss(inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Policy loss of one micro-batch.

    Without old log-probs the ratio is exactly 1 and the gradient is the plain policy gradient, -lambda w A dlogp.
    The loss and every metric add up over micro-batches and ranks, because the weights hold the global denominators.

    Returns:
        The loss (scalar, dtype of the trainer log-probs) and, for each stream s, detached scalars:
        `loss/<s>/weight`              sum of w: 1 under token_mean; the divisor that makes the others token means
        `loss/<s>/policy`              sum of w * surrogate, without lambda
        `loss/<s>/kl`                  sum of w * kl, without beta, nats; 0 where there is no reference
        `loss/<s>/ratio_mean`          sum of w * ratio
        `loss/<s>/clip_fraction`       sum of w over the tokens that PPO clipping holds
        `loss/<s>/dual_clip_fraction`  sum of w over the tokens that dual clipping holds
        `loss/<s>/entropy_bonus`       eta times the sum of w * H, which the loss is less by; where there is a bonus

    Raises:
        ValueError: a shape, dtype or clip bound is wrong, a KL coefficient asks for a missing reference, or an entropy
            coefficient for missing entropies.
    """
    check_inputs(inputs)
    trainer = inputs.trainer_logprobs
    old = trainer.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    loss = trainer.new_zeros(())
    metrics: dict[str, Tensor] = {}
    for index, stream in enumerate(inputs.streams):
        weight = inputs.token_weights[index]  # [R]
        log_rho = log_ratio(trainer, old, stream, weight, inputs.row_sequence)  # [R]
        value, clipped, dual_clipped = surrogate(stream, trainer, log_rho, inputs.advantages[index])
        policy = (weight * value).sum()
        kl = trainer.new_zeros(())
        if inputs.ref_logprobs is not None:
            kl = (weight * kl_estimate(trainer, inputs.ref_logprobs, stream.kl_estimator)).sum()
        loss = loss + stream.loss_weight * policy + stream.kl_loss_coef * kl
        sums = {
            "weight": weight.sum(),
            "policy": policy,
            "kl": kl,
            "ratio_mean": (weight * log_rho.detach().exp()).sum(),
            "clip_fraction": (weight * clipped).sum(),
            "dual_clip_fraction": (weight * dual_clipped).sum(),
        }
        metrics.update({f"loss/{stream.name}/{key}": value.detach() for key, value in sums.items()})
    bonus, bonuses = entropy_bonus(inputs)
    return (loss if bonus is None else loss - bonus), {**metrics, **bonuses}


def entropy_bonus(inputs: LossInputs) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What the loss is less by, sum_s eta_s * sum_r w[s,r] * H[r], with the gradient of the entropies; None where no
    stream has a coefficient. And `loss/<s>/entropy_bonus`, detached, of the streams that have one.

    Raises:
        ValueError: a stream has a coefficient, and there are no entropies.
    """
    users = [(index, stream) for index, stream in enumerate(inputs.streams) if stream.entropy_coef != 0.0]
    if not users:
        return None, {}
    if inputs.entropy is None:
        raise ValueError(f"entropy: None, but streams {[stream.name for _, stream in users]} have an entropy_coef.")
    rows = [index for index, _ in users]
    weights = inputs.token_weights[rows].to(inputs.entropy.dtype)
    coefficients = weights.new_tensor([stream.entropy_coef for _, stream in users])  # eta
    credited = (weights * inputs.entropy).masked_fill(weights == 0, 0.0)  # what is not finite there is no part of it
    bonuses = coefficients * credited.sum(1)
    names = (f"loss/{stream.name}/entropy_bonus" for _, stream in users)
    return bonuses.sum(), dict(zip(names, bonuses.detach(), strict=True))


def sft_loss(logprobs: Tensor, weights: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Supervised loss -sum_r w[r] log p[r]; w holds the global denominator, so losses and metrics add up.

    Args:
        logprobs: [R] of the demonstration's tokens, nats.
        weights: [R].

    Returns:
        The loss (scalar) and `loss/sft/nll` (nats; a token mean under token_mean), `loss/sft/weight`.

    Raises:
        ValueError: shapes or dtypes are wrong.
    """
    _check_logprobs("logprobs", logprobs)
    _check_shape("weights", weights, tuple(logprobs.shape))
    loss = -(weights * logprobs).sum()
    return loss, {"loss/sft/nll": loss.detach(), "loss/sft/weight": weights.sum().detach()}


def kl_estimate(trainer_logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from a token drawn from pi; [R], nats, with d = log pi_ref - log pi.

        k1 = -d          unbiased; as a loss its expected gradient is 0, so it measures but does not hold
        k2 = d^2 / 2     the gradient of the KL divergence
        k3 = e^d - d - 1 unbiased, never negative, low variance (the paper's code)

    Raises:
        ValueError: unknown estimator.
    """
    difference = ref_logprobs - trainer_logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(difference) - difference
    raise ValueError(f"kl_estimator={estimator!r}: must be one of k1, k2, k3.")


def check_inputs(inputs: LossInputs) -> None:
    """Raises ValueError where the values of `inputs` do not fit together; the message names the field."""
    _check_logprobs("trainer_logprobs", inputs.trainer_logprobs)
    num_tokens = inputs.trainer_logprobs.shape[0]
    num_streams = len(inputs.streams)
    if num_streams == 0:
        raise ValueError("streams: empty; give at least one RewardStream.")
    for name, value in (("old_logprobs", inputs.old_logprobs), ("ref_logprobs", inputs.ref_logprobs)):
        if value is not None:
            _check_shape(name, value, (num_tokens,))
    _check_shape("advantages", inputs.advantages, (num_streams, num_tokens))
    _check_shape("token_weights", inputs.token_weights, (num_streams, num_tokens))
    needy = [stream.name for stream in inputs.streams if stream.kl_loss_coef != 0.0]
    if inputs.ref_logprobs is None and needy:
        raise ValueError(f"ref_logprobs: None, but streams {needy} have a kl_coef; give them, or set kl_coef to 0.")
    if inputs.entropy is not None and inputs.entropy.shape != (num_tokens,):
        raise ValueError(f"entropy: shape {tuple(inputs.entropy.shape)}, expected {(num_tokens,)}.")
    for clip in (stream.clip for stream in inputs.streams):
        if clip.low < 0 or clip.high < 0 or (clip.dual is not None and clip.dual <= 1):
            raise ValueError(f"clip={clip}: low and high must be 0 or more, dual greater than 1 or None.")


def _check_logprobs(name: str, value: Tensor) -> None:
    """Half precision is refused: a ratio near 1 needs differences of 1e-3 nats and less."""
    if value.ndim != 1 or value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: need float32 or float64 [R], got {value.dtype} {tuple(value.shape)}.")


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {expected}.")
    if value.requires_grad:
        raise ValueError(f"{name}: carries a gradient; it is a constant of the loss, detach it.")
