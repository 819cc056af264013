"""The Triton back end of fused_stream_loss: two launches for the loss, every metric and the gradient.

Shapes: R scored tokens, S streams, B blocks of BLOCK_TOKENS tokens.

The first kernel reads every input once. A program owns one block of tokens and walks through the streams: it writes
the block's gradient, and for each stream the block's sums of the six terms into partials [S, 6, B]. The second kernel
adds the partials in a fixed order and makes the loss of the totals. No atomics: the results are the same bits in every
run on one kind of card. Numbers that a run may change (weights, coefficients, bounds) are arguments of the kernels;
a kernel is recompiled only for another set of estimators, another number of streams, with or without a reference or
dual clipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_sr1.kernels.policy_loss.triton_kernels import NUM_TERMS, add_blocks, loss_of_blocks
from megatron_sr1.types import KlEstimator, LossInputs

BLOCK_TOKENS = 512
BLOCK_PARTIALS = 128
_NUMBERS: Mapping[KlEstimator, int] = {"k1": 1, "k2": 2, "k3": 3}  # of the estimators, as the kernel knows them


def triton_loss(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], totals [S, 6] in the order of METRICS, gradient [R] of the trainer log-probs; all float32.

    Advantages, weights and constant log-probs of another dtype are read as they are and used in float32.

    Raises:
        ValueError: the log-probs are not float32, or the tensors are not where the kernels can read them.
    """
    _check_place(inputs)
    trainer = inputs.trainer_logprobs.detach().contiguous()
    num_tokens, num_streams = len(trainer), len(inputs.streams)
    num_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS)
    gradient = torch.empty_like(trainer)
    partials = trainer.new_empty(num_streams, NUM_TERMS.value, num_blocks)
    totals = trainer.new_empty(num_streams, NUM_TERMS.value)
    loss = trainer.new_empty(())
    weights = tuple(float(stream.loss_weight) for stream in inputs.streams)
    kl_coefs = tuple(float(stream.kl_loss_coef) for stream in inputs.streams)
    with torch.cuda.device_of(trainer):
        if num_blocks:
            clips = [stream.clip for stream in inputs.streams]
            low: Any = tuple(1.0 - clip.low for clip in clips)  # Triton's types know no tuples
            high: Any = tuple(1.0 + clip.high for clip in clips)
            dual: Any = tuple(0.0 if clip.dual is None else float(clip.dual) for clip in clips)
            has_dual: Any = tuple(clip.dual is not None for clip in clips)
            estimators: Any = tuple(_NUMBERS[stream.kl_estimator] for stream in inputs.streams)
            loss_of_blocks[(num_blocks,)](
                trainer,
                trainer if inputs.old_logprobs is None else inputs.old_logprobs.contiguous(),
                trainer if inputs.ref_logprobs is None else inputs.ref_logprobs.contiguous(),
                inputs.advantages.contiguous(),
                inputs.token_weights.contiguous(),
                gradient,
                partials,
                num_tokens,
                num_blocks,
                weights,
                kl_coefs,
                low,
                high,
                dual,
                HAS_DUAL=has_dual,
                HAS_REFERENCE=inputs.ref_logprobs is not None,
                ESTIMATORS=estimators,
                BLOCK=BLOCK_TOKENS,
            )
        add_blocks[(1,)](
            partials, totals, loss, num_blocks, weights, kl_coefs, STREAMS=num_streams, BLOCK=BLOCK_PARTIALS
        )
    return loss, totals, gradient


def _check_place(inputs: LossInputs) -> None:
    trainer = inputs.trainer_logprobs
    if trainer.dtype != torch.float32:
        raise ValueError(
            f"backend='triton': trainer_logprobs are {trainer.dtype}; the kernels compute in float32. "
            "Use backend='torch' for another dtype."
        )
    if not (trainer.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(
            f"backend='triton': trainer_logprobs are on {trainer.device}; the kernels need a GPU, or Triton's "
            "interpreter. Use backend='torch' there."
        )
    others = {
        "old_logprobs": inputs.old_logprobs,
        "ref_logprobs": inputs.ref_logprobs,
        "advantages": inputs.advantages,
        "token_weights": inputs.token_weights,
    }
    for name, value in others.items():
        if value is not None and value.device != trainer.device:
            raise ValueError(f"{name}: on {value.device}, but trainer_logprobs are on {trainer.device}; move it there.")
