"""Importance weights for tokens that another program drew: generator and trainer never compute quite the same numbers.

    rho[r] = pi_trainer[r] / pi_generator[r]                 both of the weights that drew the response, level "token"
    rho[r] = product of those of the response that r is in                                            level "sequence"

    truncate: w = min(rho, high)                             truncated importance sampling: Yao et al. 2025, "Your
                                                             efficient RL framework secretly brings you off-policy RL
                                                             training"
    mask:     w = rho where low <= rho <= high, else 0       IcePop, https://ringtech.notion.site/icepop

w is a constant of the loss. It scales the advantages, so it weighs the policy term alone; the surrogate, with its PPO
and dual clipping, is homogeneous in the advantage: surrogate(w A) = w surrogate(A).

`token_kinds` names where a gap lies: a stale or differently resized image shows near the image, rotary or cache errors
grow with the position, and a gap everywhere is a matter of the weights or of the arithmetic.

Shape legend: R scored tokens of the micro-batch. Log-probs are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sr1.types import MismatchKind, MismatchLevel

NEAR_IMAGE = 64  # tokens after the last visual token
POSITIONS = (0, 64, 256, 1024)  # where the bands of a response begin, in tokens
_MAX_LOG = 50.0  # e^50 is finite in float32, and far outside any bound


@dataclass(frozen=True)
class Mismatch:
    """How a log-prob gap between generator and trainer is corrected.

    Raises:
        ValueError: bounds that are not 0 <= low < high.
    """

    kind: MismatchKind = "none"
    level: MismatchLevel = "token"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high:
            raise ValueError(f"mismatch bounds low={self.low}, high={self.high}: need 0 <= low < high.")


def importance_weights(
    trainer_logprobs: Tensor, generator_logprobs: Tensor, row_sequence: Tensor, mismatch: Mismatch
) -> tuple[Tensor, Tensor]:
    """Weight of each token, and whether the bounds changed it.

    Args:
        trainer_logprobs: [R], of the weights that drew the responses.
        generator_logprobs: [R].
        row_sequence: [R] int64, the response that each token belongs to; all tokens of a response are here.

    Returns:
        [R] the dtype of the log-probs, without gradient; [R] bool. All 1 and all False for kind "none".

    Raises:
        ValueError: the three shapes differ.
    """
    if not trainer_logprobs.shape == generator_logprobs.shape == row_sequence.shape:
        raise ValueError(
            f"importance weights: trainer_logprobs {tuple(trainer_logprobs.shape)}, generator_logprobs "
            f"{tuple(generator_logprobs.shape)} and row_sequence {tuple(row_sequence.shape)} must have one shape."
        )
    log_ratio = trainer_logprobs.detach() - generator_logprobs
    if mismatch.kind == "none":
        return torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)
    if mismatch.level == "sequence" and len(row_sequence) > 0:
        sums = log_ratio.new_zeros(int(row_sequence.max()) + 1).index_add(0, row_sequence, log_ratio)
        log_ratio = sums[row_sequence]
    ratio = log_ratio.clamp(-_MAX_LOG, _MAX_LOG).exp()
    if mismatch.kind == "truncate":
        return ratio.clamp(max=mismatch.high), ratio > mismatch.high
    outside = (ratio < mismatch.low) | (ratio > mismatch.high)
    return ratio.masked_fill(outside, 0.0), outside


def token_kinds(image_distance: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Which tokens are of which kind; every token is of one of the first three, and of one position.

        text         no image in the prompt             position_<n>  response tokens from the n-th to the next band
        near_image   at most NEAR_IMAGE tokens after the last visual token
        far_image    further away from it

    Args:
        image_distance: [R] tokens since the last visual token of the prompt, negative where there is none.
        offset: [R] place in the response, from 0.

    Returns:
        [R] bool of each kind.
    """
    text, near = image_distance < 0, image_distance <= NEAR_IMAGE
    kinds = {"text": text, "near_image": near & ~text, "far_image": ~near}
    for start, end in zip(POSITIONS, (*POSITIONS[1:], float("inf")), strict=True):
        kinds[f"position_{start}"] = (offset >= start) & (offset < end)
    return kinds
