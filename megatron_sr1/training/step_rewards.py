"""The rewards of a step's rollouts: which are measured, and one tensor for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_sr1.objective import Preset
from megatron_sr1.rewards.workers import PLAIN, Vectors

ALWAYS = ("acc", "acc_vis", "leak")  # scored for the metrics whatever the preset trains on
VISUAL = ("acc_vis", "fmt_vis")

Rewards = dict[str, Tensor]  # component -> [B] float32, in the order of groups and, within, of samples


def scored_components(preset: Preset) -> list[str]:
    """Names of all rewards that a step measures, sorted."""
    return sorted({*preset.components, *ALWAYS, _layout(preset)})


def join_rewards(graded: Sequence[tuple[int, Vectors]], preset: Preset) -> Rewards:
    """One tensor per component of what the ranks graded: (group, vectors of its samples), in any order.

    The ranks of one engine grade the same groups; each group counts once. Groups without images have the layout of
    the plain prompt, which they were asked with.
    """
    vectors = [vector for _, share in sorted(dict(graded).items()) for vector in share]
    rewards = {
        name: torch.tensor([vector[name] if name in vector else vector[PLAIN[name]] for vector in vectors])
        for name in scored_components(preset)
    }
    return {**rewards, "format": rewards[_layout(preset)]}


def without_leaks(rewards: Rewards) -> Rewards:
    """The leak filter: a description that states the answer earns no visual reward."""
    honest = 1.0 - rewards["leak"]
    return {name: value * honest if name in VISUAL else value for name, value in rewards.items()}


def rewards_of(rewards: Mapping[str, Tensor], index: int) -> dict[str, float]:
    """The reward vector of rollout `index`."""
    return {name: value[index].item() for name, value in rewards.items()}


def _layout(preset: Preset) -> str:
    return "fmt_cot" if preset.template == "cot" else "fmt"
