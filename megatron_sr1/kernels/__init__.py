"""Fused kernels: the log-probability of a token from its hidden state, and the KL between two, without logits; the loss
of a micro-batch."""

from megatron_sr1.kernels.linear_logprob.divergence import linear_divergence
from megatron_sr1.kernels.linear_logprob.function import IGNORE_INDEX, linear_logprob
from megatron_sr1.kernels.policy_loss.fused import fused_stream_loss, is_fused

__all__ = ["IGNORE_INDEX", "fused_stream_loss", "is_fused", "linear_divergence", "linear_logprob"]
