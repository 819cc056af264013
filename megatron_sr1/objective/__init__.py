"""The objective: reward streams, advantages, token weights and losses, as pure functions."""

from megatron_sr1.objective.advantages import group_advantages, stream_advantages
from megatron_sr1.objective.contrast import dependency, divergence, response_weights, token_weighting
from megatron_sr1.objective.denominators import token_weights
from megatron_sr1.objective.losses import entropy_bonus, kl_estimate, sft_loss, stream_loss
from megatron_sr1.objective.mismatch import Mismatch, importance_weights, token_kinds
from megatron_sr1.objective.own_loss import OwnLoss

__all__ = [
    "Mismatch",
    "OwnLoss",
    "dependency",
    "divergence",
    "entropy_bonus",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "response_weights",
    "sft_loss",
    "stream_advantages",
    "stream_loss",
    "token_kinds",
    "token_weighting",
    "token_weights",
]
