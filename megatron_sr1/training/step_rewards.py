"""The rewards of a step's rollouts: which are measured, and one tensor for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.rewards import ALWAYS, Value, Vectors, find_reward, for_prompt, layout_reward
from megatron_sr1.streams import Preset
from megatron_sr1.types import SECOND

# by reward: [B] float32, in the order of groups and, within, of samples; of a pass with m > 1 samples [B, m]
Rewards = dict[str, Tensor]


def scored_rewards(preset: Preset) -> list[str]:
    """Names of all rewards that a step measures, sorted: among them how often each later pass is right."""
    further = {f"acc_vis@{later.name}" for later in preset.passes.later if later.name != SECOND.name}
    return sorted({*preset.rewards, *ALWAYS, *further, _layout(preset)})


def all_rewards(preset: Preset) -> list[str]:
    """Names of what a step knows of its rollouts: the measured rewards, and `format`, the reward of the layout that the
    prompt asks for."""
    return [*scored_rewards(preset), "format"]


def sample_rewards(vectors: Vectors, preset: Preset) -> Rewards:
    """[K], or [K, m], of each of `all_rewards`, of the samples of one group. A group without images has the layout of
    the plain prompt, which it was asked with."""
    rewards = {}
    for name in scored_rewards(preset):
        (plain,) = for_prompt([name], has_images=False)
        values = [vector[name] if name in vector else vector[plain] for vector in vectors]
        rewards[name] = reward_of(name, values, preset)
    return {**rewards, "format": rewards[_layout(preset)]}


def reward_of(name: str, values: Sequence[Value], preset: Preset) -> Tensor:
    """[K] float32, or [K, m], of what the samples of a group earn by one reward."""
    number = num_readings(name, preset)
    return torch.tensor(values if number == 1 else [_padded(value, number) for value in values], dtype=torch.float32)


def without_leaks(rewards: Rewards, preset: Preset) -> Rewards:
    """The leak filter: a description that states the answer earns nothing for what a pass makes of it that is asked the
    same question."""
    honest = 1.0 - rewards["leak"]

    def filtered(name: str, value: Tensor) -> Tensor:
        if not _is_visual(name, preset):
            return value
        return value * honest.view(-1, *[1] * (value.ndim - 1))

    return {name: filtered(name, value) for name, value in rewards.items()}


def num_readings(name: str, preset: Preset) -> int:
    """How many numbers a reward gives of each rollout: one for each sample of its later pass."""
    reward = find_reward(_layout(preset) if name == "format" else name)
    later = preset.later_pass(reward.later)
    return 1 if reward.of_pass == "first" or later is None else later.samples


def per_rollout(reward: Tensor) -> Tensor:
    """[B]: what a rollout earns, by all samples of the reward's pass."""
    return reward if reward.ndim == 1 else reward.mean(1)


def _padded(value: Value, number: int) -> list[float]:
    """The rewards of samples that are not there are 0."""
    found = list(value) if isinstance(value, tuple) else []
    assert len(found) in (0, number), "all samples of a pass are there, or none"
    return found or [0.0] * number


def _layout(preset: Preset) -> str:
    return layout_reward(preset.described)


def _is_visual(name: str, preset: Preset) -> bool:
    if name == "format" or find_reward(name).of_pass == "first":
        return False
    later = preset.later_pass(find_reward(name).later)
    return later is None or (later.context == "description" and not later.question)
