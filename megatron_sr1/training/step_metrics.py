"""The metrics of a GRPO step: of its rollouts, of its optimizer steps, of its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.metrics import MetricLog
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.policy import StepResult
from megatron_sr1.rewards import faithful, find_reward
from megatron_sr1.streams import Preset
from megatron_sr1.training.batches import rollout_advantages
from megatron_sr1.training.step_rewards import Rewards
from megatron_sr1.types import RolloutGroup


def step_metrics(
    groups: Sequence[RolloutGroup],
    rewards: Rewards,
    preset: Preset,
    results: Sequence[StepResult],
    clock: Clock,
    *,
    num_prompts: int,
) -> dict[str, float]:
    """All of them by name; those of several optimizer steps as their mean.

    Args:
        groups: of the `num_prompts` prompts of the step, those that could be graded.
    """
    log = MetricLog()
    log.add("groups/skipped", num_prompts - len(groups), "sum")
    for name, share in dead_groups(groups, rewards, preset).items():
        log.add(name, share)
    _log_rewards(log, groups, rewards, preset)
    num_tokens = _log_responses(log, groups)
    log.add("tokens_per_second", num_tokens / clock.seconds["seconds/rollout"])
    for result in results:
        for name, value in result.metrics.items():
            log.add(name, value)
        log.add("grad_norm", result.grad_norm)
        log.add("learning_rate", result.learning_rate, "last")
    for name, value in clock.seconds.items():
        log.add(name, value)
    return log.reduce()


def summarise(groups: Sequence[RolloutGroup], rewards: Rewards) -> dict[str, float | None]:
    """Shares over all rollouts; those about descriptions over the rollouts of prompts with images, None without any.

    language_shortcut_rate is the share whose answer is right although the description alone does not give it
    (Vision-SR1, section 5). `faithful` is None where no prompt says what its image shows.
    """
    right, seen = rewards["acc"], rewards["acc_vis"]
    shown = torch.tensor([bool(group.prompt.images) for group in groups for _ in group.pairs])
    truths = [faithful(pair.description, group.prompt) for group in groups for pair in group.pairs]
    known = [float(truth) for truth in truths if truth is not None]
    return {
        "accuracy": right.mean().item(),
        "second_pass_accuracy": _mean(seen[shown]),
        "language_shortcut_rate": _mean((right * (1.0 - seen))[shown]),
        "faithful": sum(known) / len(known) if known else None,
        "format": rewards["format"].mean().item(),
        "leak": _mean(rewards["leak"][shown]),
    }


def dead_groups(groups: Sequence[RolloutGroup], rewards: Rewards, preset: Preset) -> dict[str, float]:
    """`groups/dead/<stream>`, the share of prompts whose responses are all the same to a stream, so that it teaches
    nothing; `groups/dead`, to all streams. By what they earn: a KL in the reward, which tells most apart, is left out.
    """
    ids = torch.tensor([group.group_id for group in groups for _ in group.pairs])  # [B]
    no_kl = torch.zeros(len(preset.streams), len(ids))
    advantages = rollout_advantages(groups, rewards, preset, 1.0, no_kl)  # [S, B], of any scale
    alive = torch.stack([(advantages[:, ids == group.group_id] != 0).any(1) for group in groups], 1)  # [S, G]
    dead = {f"groups/dead/{stream.name}": row for stream, row in zip(preset.streams, ~alive, strict=True)}
    return {name: share.float().mean().item() for name, share in {**dead, "groups/dead": ~alive.any(0)}.items()}


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _log_rewards(log: MetricLog, groups: Sequence[RolloutGroup], rewards: Rewards, preset: Preset) -> None:
    for name, value in summarise(groups, rewards).items():
        if value is not None:
            log.add(name, value)
    for name, reward in rewards.items():
        if name != "format":  # in the summary already
            log.add(f"reward/{find_reward(name).shown}", reward.mean().item())
    earned = [weight * rewards[name].mean().item() for stream in preset.streams for name, weight in stream.rewards]
    log.add("reward/total", sum(earned))


def _log_responses(log: MetricLog, groups: Sequence[RolloutGroup]) -> int:
    """Returns the number of response tokens."""
    pairs = [pair for group in groups for pair in group.pairs]
    responses = {
        "first": [pair.first for pair in pairs],
        "second": [pair.second for pair in pairs if pair.second is not None],
    }
    for name, rollouts in responses.items():
        for rollout in rollouts:
            log.add(f"{name}/response_tokens", len(rollout.response_ids))
            log.add(f"{name}/longest_response_tokens", len(rollout.response_ids), "max")
            log.add(f"{name}/truncated", rollout.finish_reason == "length")
            log.add(f"seconds/{name}_pass", rollout.finished_at - rollout.queued_at)
    for pair in (pair for group in groups if group.prompt.images for pair in group.pairs):
        log.add("second/missing", pair.second is None)
        if pair.description is not None:
            log.add("second/description_cut", pair.description_cut)
    return sum(len(rollout.response_ids) for rollouts in responses.values() for rollout in rollouts)
