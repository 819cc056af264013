"""Fused kernels: the log-probability of a token from its hidden state, without logits; the loss of a micro-batch."""

from megatron_sr1.kernels.fused_loss import fused_stream_loss
from megatron_sr1.kernels.linear_logprob import IGNORE_INDEX, linear_logprob

__all__ = ["IGNORE_INDEX", "fused_stream_loss", "linear_logprob"]
