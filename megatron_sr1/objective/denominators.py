"""Global denominators: what one token of a stream weighs in the loss of the optimizer step.

    token_mean       1 / (tokens of the stream in the mini-batch)      every token the same; DAPO, arXiv 2503.14476
    sequence_mean    1 / (B * tokens of this sequence)                 every rollout the same; GRPO, arXiv 2402.03300
    sequence_sum     1 / B                                             Vision-SR1, arXiv 2508.19652, eq. 7
    constant         1 / (B * constant)                                Dr.GRPO, arXiv 2503.20783: long ones weigh more

B is the number of first-pass rollouts in the mini-batch of the optimizer step, over all ranks and micro-batches. A
rollout without a second pass has 0 tokens in a second-pass stream and still counts in B: a missing second pass must
not make the others heavier. The numbers are known before the forward pass, so no packing, micro-batching or parallel
layout can change a gradient.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from megatron_sr1.types import Aggregation


def token_weights(num_tokens: Tensor, aggregation: Aggregation, constant: int | None = None) -> Tensor:
    """Weight of each token of each rollout.

    Args:
        num_tokens: [B] or [S, B] integers: tokens that each rollout of the global mini-batch has in the stream.
        aggregation: see above.
        constant: tokens, of "constant" alone.

    Returns:
        float32, the shape of `num_tokens`: to be written on each of the rollout's tokens in the stream. 0 where the
        rollout has no token; all 0 for a stream without tokens.

    Raises:
        ValueError: not integers, negative, no rollout, wrong shape, an unknown aggregation, or a constant that is
            missing, not positive, or not asked for.
    """
    if num_tokens.ndim not in (1, 2) or num_tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"num_tokens: need int32 or int64 [num_rollouts] or [num_streams, num_rollouts], got {num_tokens.dtype} "
            f"{tuple(num_tokens.shape)}."
        )
    num_rollouts = num_tokens.shape[-1]
    if num_rollouts == 0:
        raise ValueError("num_tokens: the mini-batch has no rollout; give at least one.")
    if bool((num_tokens < 0).any()):
        raise ValueError("num_tokens: negative; counts of tokens are 0 or more.")
    if (aggregation == "constant") != (constant is not None and constant > 0):
        raise ValueError(f"aggregation={aggregation!r}, constant={constant}: one needs the other, and it positive.")
    counts = num_tokens.to(torch.float64)
    if aggregation == "token_mean":
        denominators = counts.sum(dim=-1, keepdim=True).expand_as(counts)
    elif aggregation == "sequence_mean":
        denominators = num_rollouts * counts
    elif aggregation == "sequence_sum":
        denominators = torch.full_like(counts, num_rollouts)
    elif aggregation == "constant":
        denominators = torch.full_like(counts, num_rollouts * float(constant or 1))
    else:
        raise ValueError(f"aggregation={aggregation!r}: must be one of {', '.join(get_args(Aggregation))}.")
    # 1 / 0 appears only where there is no token, and is not taken.
    return torch.where(num_tokens > 0, 1.0 / denominators, 0.0).to(torch.float32)
