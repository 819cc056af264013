"""Which groups teach a policy anything, and which of a step's groups it is trained on.

A group is dead to a stream where every response to its prompt has an advantage of exactly 0, as the trainer computes
it: after the leak filter, over the rewards of all that was drawn. With scope "group" its responses then earn the same;
with "batch" they are all at the mean of the batch; with `per_component` every reward is the same for all of them, or
the rewards cancel each other. DAPO (arXiv 2503.14476, sec. 3.2) draws further prompts in place of groups without spread
in its one reward; here a group is dead that is dead to every stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_sr1.config import ObjectiveConfig
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import rollout_advantages
from megatron_sr1.training.ledger import StepLedger
from megatron_sr1.training.step_rewards import without_leaks


def step_advantages(
    ledger: StepLedger,
    preset: Preset,
    objective: ObjectiveConfig,
    kl: Tensor | None = None,
    earned: Tensor | None = None,
) -> Tensor:
    """[S, B, M]: those that a policy is trained with, see `rollout_advantages`. Where a reward is not finite none is a
    number: it would enter those of others, so the step is skipped."""
    if ledger.bad_rewards.any():
        return torch.full((len(preset.streams), ledger.bad_rewards.numel(), preset.most_samples), torch.nan)
    rewards = ledger.rollout_rewards
    rewards = without_leaks(rewards, preset) if objective.leak_filter else rewards
    return rollout_advantages(ledger, rewards, preset, objective.advantage_eps, kl, earned)


def live_groups(ledger: StepLedger, preset: Preset, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Whether each group is alive to each stream, [S, G], and to any that has a weight in the loss, [G].

    By what they earn: a KL or a contrast in the reward, which tells most apart, is left out. A stream of `loss_weight`
    0 is measured and teaches nothing, so it keeps no group alive. A group with a reward that is not finite is alive: it
    must not be replaced in silence.
    """
    bad = ledger.bad_rewards  # [G, K]
    if bad.any():
        rewards = {name: torch.nan_to_num(each, 0.0, 0.0, 0.0) for name, each in ledger.rewards.items()}
        ledger = replace(ledger, rewards=rewards)
    none = torch.zeros(len(preset.streams), ledger.num_groups * ledger.num_samples, preset.most_samples)
    moves = step_advantages(ledger, preset, objective, none, none) != 0  # [S, B, M]
    alive = moves.unflatten(1, (ledger.num_groups, ledger.num_samples)).flatten(2).any(2) | bad.any(1)
    weighted = torch.tensor([stream.loss_weight != 0 for stream in preset.streams])
    return alive, alive[weighted].any(0)


def training_places(numbers: Sequence[int], alive: Sequence[bool], count: int) -> list[int | None]:
    """The place of each group among the `count` prompts of the training batch; None: it is dropped.

    The live groups come first, then the dead ones that are needed to fill the batch, each the oldest first; what is
    chosen keeps the order of the draw. Where even so too few are graded, the last of the places stay empty whose first
    prompts could not be: without further rounds every group has the place of its own number.

    Args:
        numbers: of the groups that are graded, in the order of the draw, increasing; the step began with those below
            `count`.
        alive: of each of them.
    """
    ranked = sorted(range(len(numbers)), key=lambda index: not alive[index])  # stable
    chosen = set(ranked[:count])
    graded = set(numbers)
    ungraded = [place for place in range(count) if place not in graded]
    empty = set(ungraded[len(ungraded) - (count - len(chosen)) :])
    places = iter([place for place in range(count) if place not in empty])
    return [next(places) if index in chosen else None for index in range(len(numbers))]
