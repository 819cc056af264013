"""Rewards of rollouts, the numbers that describe them, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.objective import Preset
from megatron_sr1.rewards import faithful
from megatron_sr1.rewards.workers import Vectors, grade_pairs
from megatron_sr1.types import Rollout, RolloutGroup

ALWAYS = ("acc", "acc_vis", "leak")  # scored for the metrics whatever the preset trains on
VISUAL = ("acc_vis", "fmt_vis")

Rewards = dict[str, Tensor]  # component -> [B] float32, in the order of groups and, within, of samples


def score_groups(
    groups: Sequence[RolloutGroup],
    preset: Preset,
    rank: int,
    num_ranks: int,
    gather: Callable[[list[Any]], list[Any]],
) -> Rewards:
    """All components of all rollouts, on every rank. Collective: each rank grades a share, so that no two ranks can
    disagree about an answer."""
    components = scored_components(preset)
    mine = [
        (index, grade_pairs(group.pairs, group.prompt, components))
        for index, group in list(enumerate(groups))[rank::num_ranks]
    ]
    return join_rewards(gather(mine), preset)


def scored_components(preset: Preset) -> list[str]:
    """Names of all rewards that a step measures, sorted."""
    return sorted({*preset.components, *ALWAYS, _layout(preset)})


def join_rewards(graded: Sequence[tuple[int, Vectors]], preset: Preset) -> Rewards:
    """One tensor per component of what the ranks graded: (group, vectors of its samples), in any order.

    The ranks of one engine grade the same groups; each group counts once.
    """
    vectors = [vector for _, share in sorted(dict(graded).items()) for vector in share]
    rewards = {name: torch.tensor([vector[name] for vector in vectors]) for name in scored_components(preset)}
    return {**rewards, "format": rewards[_layout(preset)]}


def _layout(preset: Preset) -> str:
    return "fmt_cot" if preset.template == "cot" else "fmt"


def without_leaks(rewards: Rewards) -> Rewards:
    """The leak filter: a description that states the answer earns no visual reward."""
    honest = 1.0 - rewards["leak"]
    return {name: value * honest if name in VISUAL else value for name, value in rewards.items()}


def summarise(groups: Sequence[RolloutGroup], rewards: Rewards) -> dict[str, float | None]:
    """Shares over all rollouts.

    language_shortcut_rate is the share whose answer is right although the description alone does not give it
    (Vision-SR1, section 5). `faithful` is None where no prompt says what its image shows.
    """
    right, seen = rewards["acc"], rewards["acc_vis"]
    truths = [faithful(pair.description, group.prompt) for group in groups for pair in group.pairs]
    known = [float(truth) for truth in truths if truth is not None]
    return {
        "accuracy": right.mean().item(),
        "second_pass_accuracy": seen.mean().item(),
        "language_shortcut_rate": (right * (1.0 - seen)).mean().item(),
        "faithful": sum(known) / len(known) if known else None,
        "format": rewards["format"].mean().item(),
        "leak": rewards["leak"].mean().item(),
    }


def write_rollouts(path: Path, groups: Sequence[RolloutGroup], rewards: Rewards) -> None:
    """One JSON line per sample: ids, texts, log-probs and rewards of both passes; images by the prompt's key.

    `replay.read_rollouts` gets all of it back, to the bit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    index = 0
    with path.open("w", encoding="utf-8") as file:
        for group in groups:
            for pair in group.pairs:
                line = {
                    "group_id": group.group_id,
                    "key": group.prompt.key,
                    "problem": group.prompt.problem,
                    "answer": group.prompt.answer,
                    "sample": pair.sample_index,
                    "description": pair.description,
                    "description_cut": pair.description_cut,
                    "rewards": rewards_of(rewards, index),
                    "first": _rollout(pair.first),
                    "second": _rollout(pair.second),
                }
                file.write(json.dumps(line) + "\n")
                index += 1


def rewards_of(rewards: Mapping[str, Tensor], index: int) -> dict[str, float]:
    """The reward vector of rollout `index`."""
    return {name: value[index].item() for name, value in rewards.items()}


def _rollout(rollout: Rollout | None) -> dict[str, Any] | None:
    return None if rollout is None else asdict(rollout)
