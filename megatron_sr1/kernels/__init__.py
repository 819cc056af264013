"""Fused kernels: the log-probability of a token from the hidden state, without the logits."""

from megatron_sr1.kernels.linear_logprob import IGNORE_INDEX, linear_logprob

__all__ = ["IGNORE_INDEX", "linear_logprob"]
