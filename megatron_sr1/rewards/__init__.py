"""Rewards of a sample: a named vector of plain functions, kept apart to the end."""

from megatron_sr1.rewards.components import REWARDS, score_pair
from megatron_sr1.rewards.description import faithful, leaks
from megatron_sr1.rewards.grading import grade

__all__ = ["REWARDS", "faithful", "grade", "leaks", "score_pair"]
