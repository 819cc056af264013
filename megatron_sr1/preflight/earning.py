"""Can this earn? What the first prompts of a run give, drawn and graded as its first step will draw and grade them.

Refused is what no number of steps can change: no response of any stream earns otherwise than its siblings, or nothing
earns at all. A contrast's reward or its own gradient may still tell responses apart, which only a policy can say: where
a stream has one, it is a warning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sr1.config import Config
from megatron_sr1.preflight.rows import Row, Verdict
from megatron_sr1.ranks import Exchange
from megatron_sr1.streams import Preset
from megatron_sr1.training.credit import share_credit
from megatron_sr1.training.ledger import StepLedger, slots_of
from megatron_sr1.training.live_groups import live_groups, step_advantages
from megatron_sr1.training.step_metrics import summarise
from megatron_sr1.training.step_rewards import per_rollout, without_leaks
from megatron_sr1.training.step_rollouts import StepRollouts

LEAST_FORMAT = 0.5  # of the responses; a cold start teaches the layout
MOST_CUT = 0.2  # of a pass' responses
MOST_DEAD = 0.8  # of the groups
MOST_LEAKS = 0.2  # of the descriptions
LEAST_GRADIENT = 0.05  # of the tokens
_REMEDY = "Look at what is drawn: --rollouts-only train.steps=1, and rollouts/ in the run folder."


def earning_rows(rollouts: StepRollouts, preset: Preset, config: Config, ranks: Exchange) -> list[Row]:
    """The same on every rank. Collective.

    Args:
        rollouts: of the weights that the run starts with, see `LiveRollouts.look`.
    """
    ledger, told = rollouts.ledger, summarise(rollouts.ledger)
    # a loss of a user's own may look at any token
    unknown = _contrasts_teach(preset) or config.objective.loss
    # a run that goes on may have learnt all that its next prompts ask, and others come
    hopeless: Verdict = "warn" if unknown or rollouts.step > 0 else "fail"
    rows = [
        _graded(rollouts, told["accuracy"] or 0.0),
        _format(told["format"] or 0.0),
        *_cut(ledger, preset),
        _dead(ledger, preset, config, hopeless),
        _earned(ledger, preset, config, hopeless),
    ]
    leak = told["leak"]
    if leak is not None and preset.described:
        rows.append(_leak(leak))
    return [*rows, _gradient(rollouts, preset, config, ranks, hopeless)]


def _contrasts_teach(preset: Preset) -> bool:
    return any(stream.earns_by_contrast or stream.trains_contrast for stream in preset.streams)


def _graded(rollouts: StepRollouts, accuracy: float) -> Row:
    ledger = rollouts.ledger
    found = f"{ledger.num_groups} prompts with {ledger.num_samples} samples each: {accuracy:.0%} answer correctly"
    if not rollouts.skipped:
        return Row("responses", "pass", found)
    reason = next(iter(rollouts.skipped.values()))
    return Row("responses", "warn", f"{found}; {len(rollouts.skipped)} prompts could not be graded, first {reason}")


def _format(share: float) -> Row:
    found = f"{share:.0%} of the responses keep to the layout"
    if share >= LEAST_FORMAT:
        return Row("format", "pass", found)
    return Row("format", "warn", found, "A cold start teaches it: megatron-sr1 sft, or choose another template.")


def _cut(ledger: StepLedger, preset: Preset) -> list[Row]:
    """Of all passes that the engine answers."""
    slots, shares = slots_of(preset), {}
    for name in dict.fromkeys(slot.pass_name for slot in slots):
        own = [slot.pass_name == name for slot in slots]
        there = ledger.response_tokens[..., own] > 0
        if there.any():
            shares[name] = ledger.cut[..., own][there].double().mean().item()
    found = ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + " are cut by the token limit"
    if max(shares.values(), default=0.0) <= MOST_CUT:
        return [Row("cut responses", "pass", found)]
    return [Row("cut responses", "warn", found, "Raise rollout.max_response_tokens.")]


def _leak(share: float) -> Row:
    found = f"{share:.0%} of the descriptions state the answer"
    if share <= MOST_LEAKS:
        return Row("leak", "pass", found)
    return Row("leak", "warn", found, "objective.leak_filter=true takes away what they earn by it.")


def _dead(ledger: StepLedger, preset: Preset, config: Config, hopeless: Verdict) -> Row:
    alive, kept = live_groups(ledger, preset, config.objective)  # [S, G], [G]
    shares = {stream.name: 1 - row.double().mean().item() for stream, row in zip(preset.streams, alive, strict=True)}
    dead = 1 - kept.double().mean().item()
    found = f"{dead:.0%} of the groups ({', '.join(f'{name} {share:.0%}' for name, share in shares.items())})"
    if not kept.any():
        text = f"{found}: no response earns otherwise than its siblings"
        return Row("dead groups", hopeless, text, _REMEDY)
    weighted = [stream.name for stream in preset.streams if stream.loss_weight != 0]
    if dead > MOST_DEAD or any(shares[name] == 1.0 for name in weighted):
        remedy = "rollout.dynamic_sampling draws others in their place; easier or harder data have fewer."
        return Row("dead groups", "warn", found, remedy)
    return Row("dead groups", "pass", found)


def _earned(ledger: StepLedger, preset: Preset, config: Config, hopeless: Verdict) -> Row:
    """What each stream earns in the mean, after the leak filter."""
    rewards = ledger.rollout_rewards
    rewards = without_leaks(rewards, preset) if config.objective.leak_filter else rewards
    earned = {
        stream.name: sum(weight * per_rollout(rewards[name]) for name, weight in stream.rewards)
        for stream in preset.streams
    }
    found = ", ".join(f"{name} {torch.as_tensor(values).mean().item():.3g}" for name, values in earned.items())
    weighted = [stream.name for stream in preset.streams if stream.loss_weight != 0]
    empty = [name for name in weighted if not torch.as_tensor(earned[name]).any()]
    if len(empty) == len(weighted):
        return Row("reward", hopeless, f"{found}: nothing earns", _REMEDY)
    if empty:
        return Row("reward", "warn", f"{found}: nothing earns in {', '.join(empty)}", _REMEDY)
    return Row("reward", "pass", found)


def _gradient(rollouts: StepRollouts, preset: Preset, config: Config, ranks: Exchange, hopeless: Verdict) -> Row:
    """The share of tokens that some stream credits with an advantage. Collective."""
    ledger = rollouts.ledger
    advantages = step_advantages(ledger, preset, config.objective, *_no_further(ledger, preset))
    credit = share_credit(ledger, advantages, rollouts.tracks, preset, config.rollout.max_response_tokens)
    counts = [sum(int((row != 0).sum()) for row in credit.values()), sum(len(row) for row in credit.values())]
    moved, number = ranks.gather_rows(torch.tensor([counts])).sum(0).tolist()
    share = moved / number if number else 0.0
    found = f"{share:.0%} of {number} tokens carry an advantage"
    if not moved:
        return Row("gradient", hopeless, found, _REMEDY)
    if share < LEAST_GRADIENT:
        return Row("gradient", "warn", found, "See the dead groups above.")
    return Row("gradient", "pass", found)


def _no_further(ledger: StepLedger, preset: Preset) -> Sequence[torch.Tensor]:
    """[S, B, M]: no KL and no contrast in the reward, which a policy would have to score."""
    none = torch.zeros(len(preset.streams), ledger.num_groups * ledger.num_samples, preset.most_samples)
    return none, none
