"""The surrogates: what a token of advantage A and probability ratio rho = pi / pi_old adds to the loss.

    ppo     max(-A rho, -A clip(rho))                    PPO, arXiv 1707.06347, eq. 7; where A < 0 at most -A dual:
                                                         dual clip, arXiv 1912.09729, eq. 5
    cispo   -A sg(clip(rho)) log pi                      CISPO, MiniMax-M1, arXiv 2506.13585: a token that clipping
                                                         holds keeps a gradient
    sapo    -A (4 / tau) sigmoid(tau (rho - 1))          SAPO, arXiv 2511.20347: a soft bound; tau is 1 for A > 0, and
                                                         1.05 otherwise, so that what is pushed down fades sooner

    rho of a token, or of all tokens that a stream credits in a response, "sequence":
    rho = exp(mean of log pi - log pi_old)               GSPO, arXiv 2507.18071, in the form of GSPO-token: the same
                                                         value and gradient where all tokens have one advantage

Shape legend: R scored tokens of the micro-batch. Log-probs are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sr1.types import Clip, RewardStream

SAPO_TAU_POSITIVE, SAPO_TAU_NEGATIVE = 1.0, 1.05


def log_ratio(trainer: Tensor, old: Tensor, stream: RewardStream, weight: Tensor, sequence: Tensor | None) -> Tensor:
    """[R]: log rho of a stream.

    Args:
        trainer: [R], carries the gradient.
        old: [R].
        weight: [R]: 0 where the stream credits nothing; those tokens are no part of a mean.
        sequence: [R] int64, the response of each token; needed for ratios of sequences.

    Raises:
        ValueError: a ratio of sequences without `sequence`.
    """
    difference = trainer - old
    if stream.ratio == "token":
        return difference
    if sequence is None:
        raise ValueError(f"row_sequence: None, but stream {stream.name!r} has ratio='sequence'; give it.")
    if not len(sequence):
        return difference
    own = (weight != 0).to(difference.dtype)
    size = int(sequence.max()) + 1
    sums = difference.new_zeros(size).index_add(0, sequence, difference.detach() * own)
    counts = own.new_zeros(size).index_add(0, sequence, own)
    mean = (sums / counts.clamp(min=1.0))[sequence]  # [R]
    return mean + (trainer - trainer.detach())


def surrogate(stream: RewardStream, trainer: Tensor, log_rho: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
    """[R] each: the value, and as bool what clipping and dual clipping hold."""
    rho = torch.exp(log_rho)
    nothing = torch.zeros_like(advantages, dtype=torch.bool)
    if stream.surrogate == "ppo":
        return _ppo(rho, advantages, stream.clip)
    if stream.surrogate == "cispo":
        bounded = rho.detach().clamp(1.0 - stream.clip.low, 1.0 + stream.clip.high)
        return -advantages * bounded * trainer, bounded != rho.detach(), nothing
    tau = torch.full_like(advantages, SAPO_TAU_POSITIVE).masked_fill(advantages <= 0, SAPO_TAU_NEGATIVE)
    return -advantages * (4.0 / tau) * torch.sigmoid(tau * (rho - 1.0)), nothing, nothing


def _ppo(ratio: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    unclipped = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip.low, 1.0 + clip.high)
    value = torch.maximum(unclipped, bounded)
    clipped = bounded > unclipped
    if clip.dual is None:
        return value, clipped, torch.zeros_like(clipped)
    ceiling = -advantages * clip.dual
    dual_clipped = (advantages < 0) & (value > ceiling)
    return torch.where(dual_clipped, ceiling, value), clipped, dual_clipped
