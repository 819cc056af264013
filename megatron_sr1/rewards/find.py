"""Rewards by name: one of ours, or a user's by its import path."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_sr1.import_path import is_import_path, load_object
from megatron_sr1.rewards.table import REWARDS, Need, Reward
from megatron_sr1.types import SECOND, PassName

_SHOWN = re.compile(r"[\w.-]+")
_WANTED = (
    "a reward is a function of (pair, prompt), or (pair, prompt, ask), that returns a number, a function of (group) "
    "that returns one for each of its pairs, or a megatron_sr1.rewards.Reward"
)


@functools.cache
def find_reward(name: str) -> Reward:
    """The reward of that name, or at that import path: a function, or a `Reward` of one. `name@pass` is a reward of the
    second pass, measured on another later pass, and shown as `name.pass`.

    A function by itself is of the first pass and is shown the images; what its reward needs beyond that, or does not
    need, a `Reward` says. By default it is shown by its name in the file, and one that is called as one of ours with
    the file's: `mine.acc`.

    Raises:
        ValueError: there is no such reward, or what is there is none.
        UserCodeError: the module fails where it is imported.
    """
    if name in REWARDS:
        return REWARDS[name]
    base, at, later = name.rpartition("@")
    if at and later.isidentifier():
        return _aimed(find_reward(base), base, later)
    if not is_import_path(name):
        near = difflib.get_close_matches(name, REWARDS, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown reward {name!r}: ours are {', '.join(REWARDS)}.{meant} One of your own is named by its import "
            "path, module.path:name or path/to/file.py:name."
        )
    found: Any = load_object(name, "a reward")
    place, _, own = name.rpartition(":")
    default = f"{Path(place).stem}.{own}" if own in REWARDS else own
    reward = _as_reward(found, name)
    reward = reward if reward.shown else replace(reward, shown=default)
    if reward.shown in REWARDS or not _SHOWN.fullmatch(reward.shown):
        raise ValueError(
            f"reward {name!r} is shown as {reward.shown!r}: it must be a word of letters, digits, _, . and -, and none "
            f"of {', '.join(REWARDS)}, which are ours. Name it: Reward(..., shown='another_name')."
        )
    return reward


def _aimed(reward: Reward, name: str, later: PassName) -> Reward:
    if reward.of_pass != "second" or later == SECOND.name or reward.later != SECOND.name:
        raise ValueError(
            f"reward {name + '@' + later!r}: {name!r} is of the {reward.of_pass} pass. Only rewards of the second, as "
            f"acc_vis, can be measured on another later pass; leave @{later} out."
        )
    return replace(reward, later=later, shown=f"{reward.shown}.{later}")


def _as_reward(found: Any, name: str) -> Reward:
    if isinstance(found, Reward):
        wanted = found.num_arguments
        if not _takes(found.function, name, wanted, asks="judge" in found.needs):
            raise ValueError(
                f"reward {name!r}: its function takes {_num_taken(found.function, name)} arguments, but with "
                f"needs={found.needs} it is given {wanted}: the group alone with 'group', else (pair, prompt), then "
                "ask with 'judge', then the templates with 'templates'."
            )
        return found
    more: tuple[Need, ...] = {1: ("group",), 2: (), 3: ("judge",)}[_num_arguments(found, name)]
    return Reward(found, needs=("images", *more))


def _num_arguments(function: Any, name: str) -> Literal[1, 2, 3]:
    """How many arguments the function must be given; the third must be called `ask`."""
    for number in (2, 1, 3):
        if _takes(function, name, number, asks=True):
            return number
    raise ValueError(f"reward {name!r} takes {_signature(function, name)}: {_WANTED}.")


def _num_taken(function: Any, name: str) -> str:
    """For the message."""
    counts = [number for number in range(8) if _takes(function, name, number, asks=False)]
    return " or ".join(map(str, counts)) or "other"


def _takes(function: Any, name: str, number: int, *, asks: bool) -> bool:
    """Whether it can be called with so many arguments. `asks`: a third must be called `ask`."""
    try:
        bound = _signature(function, name).bind(*range(number))
    except TypeError:
        return False
    return number < 3 or not asks or list(bound.arguments)[2:3] == ["ask"]


def _signature(function: Any, name: str) -> inspect.Signature:
    if isinstance(function, type) or not callable(function) or inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {name!r} is {function!r}: {_WANTED}.")
    try:
        return inspect.signature(function)
    except ValueError as error:  # a function in C that does not say
        raise ValueError(f"reward {name!r}: {error}. Wrap it: {_WANTED}.") from error
