"""A step without data and engines: its prompts, and the ledger of groups as one process makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE, Exchange, Ranks
from megatron_sr1.rewards import Vectors, score_group
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import Batcher, StreamRows
from megatron_sr1.training.ledger import StepLedger, slots_of
from megatron_sr1.training.payload import share_responses
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.step_rewards import all_rewards, num_readings, sample_rewards, scored_rewards
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Prompt, PromptShare, RolloutGroup
from tests.batch_cases import their_rewards, two_groups

IMAGE_TOKEN = 2


class Listed:
    """`StepPrompts` out of a list, all of them this rank's."""

    def __init__(self, first: Sequence[Prompt], further: Sequence[Prompt] = ()) -> None:
        self.first = PromptShare.whole(first)
        self.asked: list[int] = []
        self._drawn = list(first)
        self._further = list(further)

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> Any:
        """Their prompts."""
        return cls([group.prompt for group in groups])

    @property
    def keys(self) -> list[str]:
        return [prompt.key for prompt in self._drawn]

    def more(self, count: int) -> PromptShare:
        self.asked.append(count)
        given, self._further = self._further[:count], self._further[count:]
        self._drawn += given
        return PromptShare.whole(given)

    def read(self, number: int) -> Prompt:
        return self._drawn[number]

    def images(self, number: int, sizes: Any) -> Any:
        assert [image.size for image in self.read(number).images] == list(sizes)
        return self.read(number).images


def recorder(preset: Preset, num_samples: int) -> Recorder:
    """One whose streams credit every token of their pass: it reads no segments."""

    def masks(response: Any) -> Tensor:
        length = len(response.rollout.response_ids)
        own = [stream.trajectory == response.pass_name for stream in preset.streams]
        return torch.tensor(own, dtype=torch.float32)[:, None].expand(-1, length)

    return Recorder(preset, num_samples, masks, IMAGE_TOKEN)


def graded(groups: Sequence[RolloutGroup], preset: Preset) -> list[tuple[int, Vectors]]:
    """As the workers give them."""
    names = scored_rewards(preset)
    return [(group.group_id, score_group(group, names, asked=preset.asked.of(group.prompt))) for group in groups]


def rollouts_of(
    groups: Sequence[RolloutGroup],
    rewards: Mapping[str, Tensor] | None,
    preset: Preset,
    made: Recorder | None = None,
    ranks: Exchange = ALONE,
) -> StepRollouts:
    """A step that trains on all of the groups.

    Args:
        rewards: [B], or [B, m]; those that are not named are 0. None: as they are graded.
    """
    made = made or recorder(preset, len(groups[0].pairs))
    if rewards is None:
        each = [sample_rewards(vectors, preset) for _, vectors in graded(groups, preset)]
    else:
        shape = (len(groups), made.num_samples)
        known = {name: rewards.get(name) for name in all_rewards(preset)}
        every = {
            name: torch.zeros(*shape, *([m] if m > 1 else [])) if value is None else value.unflatten(0, shape)
            for name, value in known.items()
            for m in [num_readings(name, preset)]
        }
        each = [{name: value[index] for name, value in every.items()} for index in range(len(groups))]
    ledger, tracks = made.record(groups, each, ranks)
    numbers = ledger.number.tolist()
    prompts = {group.group_id: group.prompt for group in groups}
    drawn = [prompts.get(number, Prompt("", "", "")) for number in range(max(numbers) + 1)]
    return StepRollouts(ledger, Listed(drawn), numbers, groups, tracks)


def scored(groups: Sequence[RolloutGroup], preset: Preset) -> StepLedger:
    """Their ledger, as they are graded."""
    return rollouts_of(groups, None, preset).ledger


def trained(processor: Processor, preset: Preset, rewards: Mapping[str, Tensor] | None = None) -> StepRollouts:
    """The two groups of `batch_cases`, with their own rewards or others."""
    made = Recorder.of(preset, 2, processor, "train")
    return rollouts_of(two_groups(processor), their_rewards() if rewards is None else rewards, preset, made)


def rows_of(batcher: Batcher, rollouts: StepRollouts, preset: Preset, ranks: Ranks = ALONE) -> StreamRows:
    """The share of one replica, whose rank holds all groups."""
    ledger = rollouts.ledger
    share = share_responses(ledger, slots_of(preset), ranks.num_ranks, share_prefix=batcher.share_prefix)[ranks.rank]
    tracks = [rollouts.tracks[int(ledger.number[place.group])][place.sample, place.slot] for place in share]
    return batcher.rows(ledger, share, tracks, rollouts.prompts, preset, rollouts.step)
