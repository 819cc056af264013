"""Rewards of a sample: a named vector of plain functions, kept apart to the end."""

from megatron_sr1.rewards.description import faithful, leaks
from megatron_sr1.rewards.find import find_reward
from megatron_sr1.rewards.grading import grade
from megatron_sr1.rewards.length import soft_overlong
from megatron_sr1.rewards.scoring import (
    RewardError,
    Ungraded,
    Value,
    Vectors,
    mean_of,
    score_group,
    score_or_tell,
    score_pair,
)
from megatron_sr1.rewards.table import ALWAYS, REWARDS, Reward, for_prompt, layout_reward, own_rewards

__all__ = [
    "ALWAYS",
    "REWARDS",
    "Reward",
    "RewardError",
    "Ungraded",
    "Value",
    "Vectors",
    "faithful",
    "find_reward",
    "for_prompt",
    "grade",
    "layout_reward",
    "leaks",
    "mean_of",
    "own_rewards",
    "score_group",
    "score_or_tell",
    "score_pair",
    "soft_overlong",
]
