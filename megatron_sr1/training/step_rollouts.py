"""All that a step has drawn, and what of it the policy is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_sr1.training.step_rewards import Rewards
from megatron_sr1.types import RolloutGroup


@dataclass(frozen=True)
class StepRollouts:
    """The same on every rank."""

    groups: Sequence[RolloutGroup]  # graded, in the order of the draw; group_id is the place in the draw
    rewards: Rewards  # [B] each, of all of them
    places: Sequence[int | None]  # of each group: its prompt's place in the training batch; None: it is dropped
    skipped: Mapping[int, str] = field(default_factory=dict)  # by place in the draw: why a group could not be graded
    rounds: int | None = None  # of further prompts that were drawn; None: without dynamic sampling

    @property
    def num_drawn(self) -> int:
        """Prompts."""
        return len(self.groups) + len(self.skipped)

    @property
    def trained(self) -> tuple[list[RolloutGroup], Rewards]:
        """The groups that are trained on, group_id their place in the batch, and their rewards."""
        chosen, rows, start = [], [], 0
        for group, place in zip(self.groups, self.places, strict=True):
            end = start + len(group.pairs)
            if place is not None:
                chosen.append(replace(group, group_id=place))
                rows += range(start, end)
            start = end
        index = torch.tensor(rows, dtype=torch.long)
        return chosen, {name: reward[index] for name, reward in self.rewards.items()}


def all_trained(
    groups: Sequence[RolloutGroup], rewards: Rewards, skipped: Mapping[int, str] | None = None
) -> StepRollouts:
    """Of a step that trains on whatever it has drawn."""
    return StepRollouts(groups, rewards, [group.group_id for group in groups], skipped or {})
