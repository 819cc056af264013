"""Rewards of groups as one process measures them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.rewards import Vectors, score_group
from megatron_sr1.streams import Preset
from megatron_sr1.training.step_rewards import Rewards, join_rewards, scored_rewards
from megatron_sr1.types import RolloutGroup


def graded(groups: Sequence[RolloutGroup], preset: Preset) -> list[tuple[int, Vectors]]:
    """As the workers give them."""
    names = scored_rewards(preset)
    return [(group.group_id, score_group(group, names, asked=preset.asked.of(group.prompt))) for group in groups]


def scored(groups: Sequence[RolloutGroup], preset: Preset) -> Rewards:
    return join_rewards(graded(groups, preset), preset)
