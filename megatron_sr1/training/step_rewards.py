"""The rewards of a step's rollouts: which are measured, and one tensor for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_sr1.rewards import ALWAYS, Vectors, find_reward, for_prompt, layout_reward
from megatron_sr1.streams import Preset

Rewards = dict[str, Tensor]  # by reward: [B] float32, in the order of groups and, within, of samples


def scored_rewards(preset: Preset) -> list[str]:
    """Names of all rewards that a step measures, sorted."""
    return sorted({*preset.rewards, *ALWAYS, _layout(preset)})


def join_rewards(graded: Sequence[tuple[int, Vectors]], preset: Preset) -> Rewards:
    """One tensor per reward of what the ranks graded: (group, vectors of its samples), in any order.

    The ranks of one engine grade the same groups; each group counts once. Groups without images have the layout of
    the plain prompt, which they were asked with.
    """
    vectors = [vector for _, share in sorted(dict(graded).items()) for vector in share]
    rewards = {}
    for name in scored_rewards(preset):
        (plain,) = for_prompt([name], has_images=False)
        values = [vector[name] if name in vector else vector[plain] for vector in vectors]
        rewards[name] = torch.tensor(values, dtype=torch.float32)
    return {**rewards, "format": rewards[_layout(preset)]}


def without_leaks(rewards: Rewards) -> Rewards:
    """The leak filter: a description that states the answer earns nothing for what the second pass makes of it."""
    honest = 1.0 - rewards["leak"]
    return {name: value * honest if _is_visual(name) else value for name, value in rewards.items()}


def rewards_of(rewards: Mapping[str, Tensor], index: int) -> dict[str, float]:
    """The reward vector of rollout `index`."""
    return {name: value[index].item() for name, value in rewards.items()}


def _layout(preset: Preset) -> str:
    return layout_reward(preset.described)


def _is_visual(name: str) -> bool:
    return name != "format" and find_reward(name).of_pass == "second"
