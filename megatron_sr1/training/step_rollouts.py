"""All that a step has drawn, and what of it the policy is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_sr1.training.ledger import StepLedger
from megatron_sr1.training.recorder import GroupTracks
from megatron_sr1.types import DrawnPrompts, RolloutGroup


@dataclass(frozen=True)
class StepRollouts:
    """The same on every rank, but for `groups` and `tracks`, which each group has on one: its holder."""

    ledger: StepLedger  # of the graded groups, in the order of the draw
    prompts: DrawnPrompts  # all that were drawn; the number of a group is that of its prompt
    places: Sequence[int | None]  # of each graded group: its prompt's place in the training batch; None: it is dropped
    groups: Sequence[RolloutGroup]  # graded ones that this rank holds; group_id is the number
    tracks: Mapping[int, GroupTracks]  # of these, by number
    skipped: Mapping[int, str] = field(default_factory=dict)  # by number: why a group could not be graded
    rounds: int | None = None  # of further prompts that were drawn; None: without dynamic sampling
    step: int = 0

    @property
    def num_drawn(self) -> int:
        """Prompts."""
        return len(self.prompts.keys)

    @property
    def trained_keys(self) -> list[str]:
        """Of the prompts that are trained on."""
        return [self.prompts.keys[int(number)] for number in self.trained[0].number]

    def told_bad_rewards(self) -> list[str]:
        """What is not finite, of what is trained on, in words: one a sample and reward."""
        ledger = self.trained[0]
        keys = self.trained_keys
        return [
            f"the reward {name!r} gave {reward[group, sample].tolist()} for response {sample} to sample {keys[group]!r}"
            for group, sample in ledger.bad_rewards.nonzero().tolist()
            for name, reward in ledger.rewards.items()
            if not torch.isfinite(reward[group, sample]).all()
        ]

    @property
    def trained(self) -> tuple[StepLedger, list[int]]:
        """The groups that are trained on, and the place of each in the batch."""
        chosen = [index for index, place in enumerate(self.places) if place is not None]
        return self.ledger.of(chosen), [place for place in self.places if place is not None]
