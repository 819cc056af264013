"""A step without data and engines: its prompts, and the rewards of groups as one process measures them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sr1.rewards import Vectors, score_group
from megatron_sr1.streams import Preset
from megatron_sr1.training.step_rewards import Rewards, join_rewards, scored_rewards
from megatron_sr1.types import Prompt, RolloutGroup


class Listed:
    """`StepPrompts` out of a list."""

    def __init__(self, first: Sequence[Prompt], further: Sequence[Prompt] = ()) -> None:
        self.first = list(first)
        self.asked: list[int] = []
        self._further = list(further)

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> Any:
        """Their prompts."""
        return cls([group.prompt for group in groups])

    def more(self, count: int) -> list[Prompt]:
        self.asked.append(count)
        given, self._further = self._further[:count], self._further[count:]
        return given


def graded(groups: Sequence[RolloutGroup], preset: Preset) -> list[tuple[int, Vectors]]:
    """As the workers give them."""
    names = scored_rewards(preset)
    return [(group.group_id, score_group(group, names, asked=preset.asked.of(group.prompt))) for group in groups]


def scored(groups: Sequence[RolloutGroup], preset: Preset) -> Rewards:
    return join_rewards(graded(groups, preset), preset)
