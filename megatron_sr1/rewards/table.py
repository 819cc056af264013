"""What a reward is to everybody who reads one, and the table of our own.

A stream weighs rewards; the graders compute them; the leak filter, evaluation, metrics and report look here for what
they must know of one. A reward of a user (`find.py`) is a `Reward` like ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_sr1.rewards import components
from megatron_sr1.types import PassName, Prompt, RolloutGroup, RolloutPair

Need = Literal["images", "group", "description", "metadata"]
PairReward = Callable[[RolloutPair, Prompt], float]
GroupReward = Callable[[RolloutGroup], Sequence[float]]


@dataclass(frozen=True)
class Reward:
    """A function, and what must be known to call it and to use its numbers.

    Raises:
        ValueError: an unknown pass or need; `rounded` of a group's function.
    """

    function: PairReward | GroupReward
    of_pass: PassName = "first"  # of the second: 0.0 where there is none, and taken away by the leak filter
    # images:      the prompt's decoded pictures come to the process that grades
    # group:       the function takes a whole RolloutGroup and returns a number for each of its pairs
    # description: 0.0 where there is none, so the first pass must be asked for one
    # metadata:    the sample must have some
    needs: tuple[Need, ...] = ()
    shown: str = ""  # its name in metrics and reports; "": its name in the file
    plain: str = ""  # the name of the reward that stands in for it where a prompt has no images
    rounded: PairReward | None = None  # the same for an evaluation that lets answers be rounded

    def __post_init__(self) -> None:
        for name, got, allowed in (
            ("of_pass", (self.of_pass,), get_args(PassName)),
            ("needs", self.needs, get_args(Need)),
        ):
            wrong = [value for value in got if value not in allowed]
            if isinstance(got, str) or wrong:
                raise ValueError(f"Reward {self.name!r}: {name}={got!r}: allowed are {', '.join(allowed)}.")

    @property
    def name(self) -> str:
        """In metrics and reports."""
        return self.shown

    def for_evaluation(self) -> Reward:
        """The same, in its rounded form where it has one."""
        return self if self.rounded is None else replace(self, function=self.rounded, rounded=None)


def _accuracy(name: str, function: Callable[..., float], *needs: Need, of_pass: PassName = "first") -> Reward:
    # evaluation may count 0.33 for 1/3; training never does, or rounding would earn what calculating earns
    return Reward(function, of_pass, needs, name, rounded=functools.partial(function, rounded=True))


REWARDS: Mapping[str, Reward] = {
    "acc": _accuracy("acc", components.accuracy),
    "acc_vis": _accuracy("acc_vis", components.visual_accuracy, "description", of_pass="second"),
    "fmt": Reward(components.see_think_format, shown="fmt", plain="fmt_cot"),
    "fmt_vis": Reward(components.visual_format, "second", ("description",), "fmt_vis"),
    "leak": Reward(components.leak, needs=("description",), shown="leak"),
    "fmt_cot": Reward(components.cot_format, shown="fmt_cot"),
}
ALWAYS = ("acc", "acc_vis", "leak")  # scored for the metrics, whatever is trained on


def layout_reward(described: bool) -> str:
    """The reward for the layout that the first pass is asked for, with a description or without."""
    return "fmt" if described else REWARDS["fmt"].plain


def own_rewards(described: bool) -> tuple[str, ...]:
    """Our rewards of answers with descriptions, or of such as were never asked for one."""
    if described:
        return tuple(name for name in REWARDS if name != layout_reward(False))
    return for_prompt([name for name, reward in REWARDS.items() if "description" not in reward.needs], False)


def for_prompt(names: Iterable[str], has_images: bool) -> tuple[str, ...]:
    """What is measured of a prompt's answers where `names` are asked for, each once."""
    if has_images:
        return tuple(dict.fromkeys(names))
    return tuple(dict.fromkeys((REWARDS[name].plain or name) if name in REWARDS else name for name in names))
