"""The metrics of a GRPO step: of its rollouts, of its optimizer steps, of its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.config import ObjectiveConfig
from megatron_sr1.metrics import MetricLog
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.metrics.shown import STREAM_REWARD
from megatron_sr1.policy import StepResult
from megatron_sr1.policy.work import StepWork
from megatron_sr1.rewards import find_reward
from megatron_sr1.streams import Preset
from megatron_sr1.training.ledger import FIRST, StepLedger, slots_of
from megatron_sr1.training.live_groups import live_groups
from megatron_sr1.training.step_rewards import per_rollout
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import SECOND

_OF_SECOND = ("second_pass_accuracy", "language_shortcut_rate")


def step_metrics(
    rollouts: StepRollouts,
    preset: Preset,
    objective: ObjectiveConfig,
    results: Sequence[StepResult],
    clock: Clock,
    work: StepWork | None = None,
) -> dict[str, float]:
    """All of them by name; those of several optimizer steps as their mean.

    `work`: of them all; None: nothing was trained.

    Of what: `reward/*` and what the optimizer steps measure, of the groups that are trained on; everything else, of all
    that was drawn, so that it speaks of the data as they come, whatever dynamic sampling keeps of them.
    """
    log, ledger = MetricLog(), rollouts.ledger
    log.add("groups/skipped", len(rollouts.skipped), "sum")
    alive, kept = live_groups(ledger, preset, objective)
    shares = {f"groups/dead/{stream.name}": row for stream, row in zip(preset.streams, ~alive, strict=True)}
    for name, dead in {**shares, "groups/dead": ~kept}.items():
        log.add(name, dead.float().mean().item())
    if rollouts.rounds is not None:
        _log_sampling(log, rollouts, kept)
    asked = {later.name for later in preset.passes.later}
    for name, value in summarise(ledger).items():
        if value is not None and (name not in _OF_SECOND or SECOND.name in asked):
            log.add(name, value)
    _log_rewards(log, rollouts.trained[0], preset)
    _log_siblings(log, ledger, preset, rollouts.step)
    _log_responses(log, ledger, preset)
    log.add("tokens_per_second", int(ledger.response_tokens.sum()) / clock.seconds["seconds/rollout"])
    for result in results:
        for name, value in result.metrics.items():
            log.add(name, value)
        log.add("grad_norm", result.grad_norm)
        log.add("skipped_updates", result.skipped, "sum")
        log.add("learning_rate", result.learning_rate, "last")
    taken = {} if work is None else work.metrics(clock.seconds["seconds/train"])
    for name, value in {**taken, **clock.seconds}.items():
        log.add(name, value)
    return log.reduce()


def summarise(ledger: StepLedger) -> dict[str, float | None]:
    """Shares over all rollouts; those about descriptions over the rollouts of prompts with images, None without any.

    language_shortcut_rate is the share whose answer is right although the description alone does not give it
    (Vision-SR1, section 5). `faithful` is None where no prompt says what its image shows.
    """
    rewards, shown = ledger.rollout_rewards, ledger.rollout_shown
    right, seen = rewards["acc"], per_rollout(rewards["acc_vis"])
    return {
        "accuracy": right.mean().item(),
        "second_pass_accuracy": _mean(seen[shown]),
        "language_shortcut_rate": _mean((right * (1.0 - seen))[shown]),
        "faithful": _mean(ledger.faithful[~ledger.faithful.isnan()]),
        "format": rewards["format"].mean().item(),
        "leak": _mean(rewards["leak"][shown]),
    }


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _log_sampling(log: MetricLog, rollouts: StepRollouts, alive: Tensor) -> None:
    """`alive`: [G]."""
    trained = torch.tensor([place is not None for place in rollouts.places])
    log.add("sampling/rounds", rollouts.rounds or 0)
    log.add("sampling/drawn", rollouts.num_drawn)
    log.add("sampling/dead_dropped", int((~alive & ~trained).sum()))
    log.add("sampling/dead_trained", int((~alive & trained).sum()))


def _log_rewards(log: MetricLog, ledger: StepLedger, preset: Preset) -> None:
    rewards, shown = ledger.rollout_rewards, ledger.rollout_shown
    asked = {later.name for later in preset.passes.later}
    for name, reward in rewards.items():
        if name == "format" or (name == "acc_vis" and SECOND.name not in asked):  # in the summary already; not asked
            continue
        further = find_reward(name).of_pass == "second" and find_reward(name).later != SECOND.name
        values = reward[shown] if further else reward  # of prompts that are asked such a pass
        if len(values):
            log.add(f"reward/{find_reward(name).shown}", values.mean().item())
    total = 0.0
    for stream in preset.streams:
        earned = sum(weight * rewards[name].mean().item() for name, weight in stream.rewards)
        log.add(f"{STREAM_REWARD}{stream.name}", earned)
        total += earned
    log.add("reward/total", total)


def _log_siblings(log: MetricLog, ledger: StepLedger, preset: Preset, step: int) -> None:
    """Of the groups that have siblings drawn from noisy images, both kinds beside each other."""
    if preset.distorted is not None:
        log.add("schedule/distorted/strength", preset.distorted.at(step))
    mixed = ledger.distorted.any(1)
    if not mixed.any():
        return
    named = {name: per_rollout(reward).view(ledger.distorted.shape) for name, reward in ledger.rollout_rewards.items()}
    earned = sum(weight * named[name] for stream in preset.streams for name, weight in stream.rewards)
    of_samples = {"accuracy": named["acc"], "reward": earned, "response_tokens": ledger.response_tokens[..., FIRST]}
    for kind, chosen in (("clean", ~ledger.distorted), ("distorted", ledger.distorted)):
        for name, value in of_samples.items():
            log.add(f"siblings/{kind}/{name}", value[mixed][chosen[mixed]].double().mean().item())


def _log_responses(log: MetricLog, ledger: StepLedger, preset: Preset) -> None:
    slots = slots_of(preset)
    for name in dict.fromkeys(slot.pass_name for slot in slots):
        own = [slot.pass_name == name for slot in slots]
        tokens = ledger.response_tokens[..., own]
        there = tokens > 0  # what an endpoint writes has no tokens
        if there.any():
            counts = tokens[there].double()
            log.add(f"{name}/response_tokens", counts.mean().item())
            log.add(f"{name}/longest_response_tokens", counts.max().item(), "max")
            log.add(f"{name}/truncated", ledger.cut[..., own][there].double().mean().item())
            log.add(f"seconds/{name}_pass", ledger.seconds[..., own][there].double().mean().item())
    if ledger.shown.any():
        for later in preset.passes.later:
            own = [slot.pass_name == later.name for slot in slots]
            missing = ~ledger.answered[ledger.shown][..., own].any(-1)
            log.add(f"{later.name}/missing", missing.double().mean().item())
    shortened = ledger.description_cut[ledger.shown][ledger.described[ledger.shown]]
    if len(shortened):
        log.add("second/description_cut", shortened.double().mean().item())
