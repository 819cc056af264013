"""The reward components and their one table. Each maps (pair, prompt) to 0.0 or 1.0; weights belong to the streams.

A response that was cut by the token limit is graded on what is there. Without a second pass its components are 0.0:
a first pass without a description earns no visual reward (method, defect 1).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from megatron_sr1.prompts import extract_boxed, parse_reasoner, parse_see_think
from megatron_sr1.rewards.description import leaks
from megatron_sr1.rewards.grading import grade
from megatron_sr1.types import Prompt, RewardFn, Rollout, RolloutPair


def accuracy(pair: RolloutPair, prompt: Prompt, *, rounded: bool = False) -> float:
    """The last box of the first response holds the gold answer."""
    return _accuracy(pair.first, prompt, rounded)


def see_think_format(pair: RolloutPair, prompt: Prompt) -> float:
    """The first response is the See-Think layout, entirely."""
    return float(parse_see_think(pair.first.response_text) is not None)


def cot_format(pair: RolloutPair, prompt: Prompt) -> float:
    """The first response is the layout of the plain reasoning prompt, entirely."""
    return float(parse_reasoner(pair.first.response_text) is not None)


def visual_accuracy(pair: RolloutPair, prompt: Prompt, *, rounded: bool = False) -> float:
    """The last box of the second response, written from the description alone, holds the gold answer."""
    return 0.0 if pair.second is None else _accuracy(pair.second, prompt, rounded)


def visual_format(pair: RolloutPair, prompt: Prompt) -> float:
    """The second response is the reasoner layout, which has no description (method, defect 2)."""
    return 0.0 if pair.second is None else float(parse_reasoner(pair.second.response_text) is not None)


def leak(pair: RolloutPair, prompt: Prompt) -> float:
    """The description given to the second pass states the answer (method, defect 3). To be reported, or subtracted."""
    return float(leaks(pair.description, prompt))


REWARDS: Mapping[str, RewardFn] = {
    "acc": accuracy,
    "fmt": see_think_format,
    "fmt_cot": cot_format,
    "acc_vis": visual_accuracy,
    "fmt_vis": visual_format,
    "leak": leak,
}
# evaluation may count 0.33 for 1/3; training never does, or rounding would earn what calculating earns
_ROUNDED: Mapping[str, RewardFn] = {
    "acc": functools.partial(accuracy, rounded=True),
    "acc_vis": functools.partial(visual_accuracy, rounded=True),
}


def score_pair(
    pair: RolloutPair, prompt: Prompt, components: Iterable[str], *, rounded: bool = False
) -> dict[str, float]:
    """The named rewards of one sample; `rounded` as in `grade`. An exception in a component is the caller's to see,
    never a 0.0.

    Raises:
        ValueError: a component is not in REWARDS.
    """
    names = list(components)
    unknown = [name for name in names if name not in REWARDS]
    if unknown:
        raise ValueError(f"unknown reward component {unknown[0]!r}: the known ones are {', '.join(REWARDS)}.")
    rewards = {**REWARDS, **_ROUNDED} if rounded else REWARDS
    return {name: rewards[name](pair, prompt) for name in names}


def _accuracy(rollout: Rollout, prompt: Prompt, rounded: bool) -> float:
    answer = extract_boxed(rollout.response_text)
    return float(answer is not None and grade(answer, prompt.answer, prompt.choices, rounded=rounded))
