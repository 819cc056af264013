"""Rewards of groups as one process measures them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.objective import Preset
from megatron_sr1.rewards.workers import Vectors, grade_pairs
from megatron_sr1.training.step_rewards import Rewards, join_rewards, scored_components
from megatron_sr1.types import RolloutGroup


def graded(groups: Sequence[RolloutGroup], preset: Preset) -> list[tuple[int, Vectors]]:
    """As the workers give them."""
    components = scored_components(preset)
    return [(group.group_id, grade_pairs(group.pairs, group.prompt, components)) for group in groups]


def scored(groups: Sequence[RolloutGroup], preset: Preset) -> Rewards:
    return join_rewards(graded(groups, preset), preset)
