"""The rewards of a group's samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_sr1.import_path import UserCode, UserCodeError, source_of
from megatron_sr1.prompts import OURS, Asked
from megatron_sr1.rewards.find import find_reward
from megatron_sr1.rewards.table import REWARDS, Ask, Reward
from megatron_sr1.types import PassName, Prompt, RolloutGroup, RolloutPair

Value = float | tuple[float, ...]  # one a sample of its pass, where there are several; () where they are not there
LARGEST = 1e9  # of a number that a reward gives: groups of larger ones have squares beyond float32
Vectors = list[dict[str, Value]]  # one reward vector per sample, by the names that were asked for


class RewardError(UserCodeError):
    """A group cannot be graded; the message names reward, sample and reason. Never a reward of 0.0."""


@dataclass(frozen=True)
class Ungraded:
    """A group without rewards, and why."""

    reason: str


def score_or_tell(
    group: RolloutGroup,
    names: Iterable[str],
    *,
    rounded: bool = False,
    finite: bool = True,
    ask: Ask | None = None,
    asked: Asked = OURS,
) -> Vectors | Ungraded:
    """As `score_group`, for ranks that must all hear of a RewardError."""
    try:
        return score_group(group, names, rounded=rounded, finite=finite, ask=ask, asked=asked)
    except RewardError as error:
        return Ungraded(str(error))


def score_group(
    group: RolloutGroup,
    names: Iterable[str],
    *,
    rounded: bool = False,
    finite: bool = True,
    ask: Ask | None = None,
    asked: Asked = OURS,
) -> Vectors:
    """The named rewards of all samples of one prompt.

    Args:
        group: with its images where a reward needs them.
        rounded: as in `grade`.
        finite: a NaN or an infinity is an error; else it stays what it is, for a step that is then skipped.
        ask: for the rewards that need a judge.
        asked: the templates of this prompt's passes, see `Asked.of`.

    Raises:
        RewardError: a reward raised something, or gave another thing than a number for each sample, or, with `finite`,
            one that is not.
        ValueError: see `find_reward`.
    """
    vectors: Vectors = [{} for _ in group.pairs]
    for name in names:
        reward = find_reward(name)
        values = _values(name, reward.for_evaluation() if rounded else reward, group, ask, asked)
        if finite:
            _must_be_finite(name, group, values)
        for vector, value in zip(vectors, values, strict=True):
            vector[name] = value
    return vectors


def _must_be_finite(name: str, group: RolloutGroup, values: Sequence[Value]) -> None:
    for pair, value in zip(group.pairs, values, strict=True):
        for number in value if isinstance(value, tuple) else (value,):
            if not math.isfinite(number):
                where = f"response {pair.sample_index} to sample {group.prompt.key!r}"
                raise RewardError(f"the reward {name!r} gave {number} for {where}: it must be a finite number.")


def mean_of(value: Value) -> float:
    """What a sample earns by the samples of one of its later passes; 0.0 where they are not there."""
    if not isinstance(value, tuple):
        return value
    return sum(value) / len(value) if value else 0.0


def score_pair(
    pair: RolloutPair, prompt: Prompt, names: Iterable[str], *, rounded: bool = False, asked: Asked = OURS
) -> dict[str, Value]:
    """The named rewards of one sample. Raises as `score_group`."""
    return score_group(RolloutGroup(0, prompt, (pair,)), names, rounded=rounded, asked=asked)[0]


def _values(name: str, reward: Reward, group: RolloutGroup, ask: Ask | None, asked: Asked) -> Sequence[Value]:
    """Of each sample. What is measured on a later pass is measured on each of its samples by itself."""
    if reward.of_pass == "first":
        return _view_values(name, reward, group, ask, asked)
    found = [len(pair.readings(reward.later)) for pair in group.pairs]
    once = "judge" in reward.needs and name.partition("@")[0] in REWARDS  # ours looks at what was read alone
    views = [_view(group, reward.later, number, asked) for number in range(1 if once else max(1, *found))]
    values = list(zip(*(_view_values(name, reward, view, ask, by) for view, by in views), strict=True))
    if max(found) < 2:
        return [each[0] for each in values]
    return [(each * number)[:number] for each, number in zip(values, found, strict=True)]


def _view(group: RolloutGroup, later: PassName, number: int, asked: Asked) -> tuple[RolloutGroup, Asked]:
    """The group as a reward of the second pass looks at it: one sample of a later pass in the place of the second, with
    what it was given and asked, and by which template."""
    pairs, question, by = [], None, asked
    for pair in group.pairs:
        reading = next((each for each in pair.readings(later) if each.number == number), None)
        if reading is None:
            pairs.append(replace(pair, second=None, further=()))
            continue
        by = replace(asked, second=asked.plain) if reading.context is None else asked
        given, question = reading.context or "", reading.question or question
        pairs.append(replace(pair, second=reading.rollout, description=given, further=()))
    prompt = group.prompt if question is None else question.asked_of(group.prompt)
    return replace(group, pairs=tuple(pairs), prompt=prompt), by


def _view_values(name: str, reward: Reward, group: RolloutGroup, ask: Ask | None, asked: Asked) -> list[float]:
    key = group.prompt.key
    assert ask is not None or "judge" not in reward.needs, f"the reward {name!r} needs a judge"
    more = (*([ask] if "judge" in reward.needs else ()), *([asked] if "templates" in reward.needs else ()))
    if "metadata" in reward.needs and not group.prompt.metadata:
        raise RewardError(f"the reward {name!r} needs metadata, and sample {key!r} has none. Add it to the data set.")
    missing = [_is_missing(reward, pair) for pair in group.pairs]
    function: Any = reward.function
    if "group" in reward.needs:
        with UserCode(f"the reward {name!r} failed on sample {key!r}", source_of(function), RewardError):
            given = function(group)
        values = _one_each(given, name, group)
        return [0.0 if gone else value for value, gone in zip(values, missing, strict=True)]
    values = []
    for pair, gone in zip(group.pairs, missing, strict=True):
        if gone:
            values.append(0.0)
            continue
        where = f"response {pair.sample_index} to sample {key!r}"
        with UserCode(f"the reward {name!r} failed on {where}", source_of(function), RewardError):
            value = function(pair, group.prompt, *more)
        values.append(_number(value, name, where))
    return values


def _is_missing(reward: Reward, pair: RolloutPair) -> bool:
    """Whether what is measured is not there. A first pass without a description earns no visual reward (method,
    defect 1)."""
    no_second = reward.of_pass == "second" and pair.second is None
    return no_second or ("description" in reward.needs and pair.description is None)


def _one_each(values: Any, name: str, group: RolloutGroup) -> list[float]:
    where = f"sample {group.prompt.key!r}"
    if isinstance(values, str | bytes | dict | set | frozenset):  # of a set the order means nothing
        raise RewardError(f"the reward {name!r} gave {values!r} for {where}: it must be a list of numbers.")
    with UserCode(f"the reward {name!r} gave no list for {where}", None, RewardError):
        values = list(values)
    if len(values) != len(group.pairs):
        raise RewardError(
            f"the reward {name!r} gave {len(values)} numbers for the {len(group.pairs)} responses to {where}. It must "
            "give one for each, in their order."
        )
    return [_number(value, name, f"response {number} to {where}") for number, value in enumerate(values)]


def _number(value: Any, name: str, where: str) -> float:
    """A plain float of whatever Python, numpy or torch call a number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RewardError(f"the reward {name!r} gave {value!r:.80} for {where}: it must be a number.") from error
    is_too_large = math.isfinite(number) and abs(number) > LARGEST
    if isinstance(value, str | bytes | bytearray) or is_too_large:
        raise RewardError(
            f"the reward {name!r} gave {value!r:.80} for {where}: it must be a finite number, and none beyond "
            f"{LARGEST:g}."
        )
    return number
