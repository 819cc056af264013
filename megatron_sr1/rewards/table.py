"""What a reward is to everybody who reads one, and the table of our own.

A stream weighs rewards; the graders compute them; the leak filter, evaluation, metrics and report look here for what
they must know of one. A reward of a user (`find.py`) is a `Reward` like ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_sr1.prompts import Asked
from megatron_sr1.rewards import components
from megatron_sr1.types import SECOND, PassName, Prompt, RolloutGroup, RolloutPair, Stage

Need = Literal["images", "group", "description", "metadata", "judge", "templates"]
Ask = Callable[[str], str]  # a question to the endpoint's whole response; raises NoVerdict
PairReward = (
    Callable[[RolloutPair, Prompt], float]
    | Callable[[RolloutPair, Prompt, Ask], float]
    | Callable[[RolloutPair, Prompt, Asked], float]
    | Callable[[RolloutPair, Prompt, Ask, Asked], float]
)
GroupReward = Callable[[RolloutGroup], Sequence[float]]


@dataclass(frozen=True)
class Reward:
    """A function, and what must be known to call it and to use its numbers.

    Raises:
        ValueError: an unknown pass or need; a group's function that asks a judge, or for templates.
    """

    function: PairReward | GroupReward
    of_pass: Stage = "first"  # second: what the description leads to. 0.0 without one; the leak filter takes it away
    # images:      the prompt's decoded pictures come to the process that grades
    # group:       the function takes a whole RolloutGroup and returns a number for each of its pairs
    # description: 0.0 where there is none, so the first pass must be asked for one
    # metadata:    the sample must have some
    # judge:       the function takes (pair, prompt, ask), and asks the endpoint of rewards.judge
    # templates:   its last argument is the `prompts.Asked` of the prompt, to read the responses by
    needs: tuple[Need, ...] = ()
    shown: str = ""  # its name in metrics and reports; "": its name in the file
    plain: str = ""  # the name of the reward that stands in for it where a prompt has no images
    later: PassName = SECOND.name  # the later pass that is measured, where of_pass is second; set by `name@pass`
    rounded: PairReward | None = None  # the same for an evaluation that lets answers be rounded
    # what it asks a judge, where the first pass alone tells: it is asked then, and the function finds the answer there
    foreseen: Callable[[RolloutPair, Prompt, Asked], str | None] | None = None

    def __post_init__(self) -> None:
        for name, got, allowed in (
            ("of_pass", (self.of_pass,), get_args(Stage)),
            ("needs", self.needs, get_args(Need)),
        ):
            if not isinstance(self.shown, str):
                raise ValueError(f"Reward: shown={self.shown!r}: it must be a text.")
            wrong = [value for value in got if value not in allowed]
            if isinstance(got, str) or wrong:
                raise ValueError(f"Reward {self.shown!r}: {name}={got!r}: allowed are {', '.join(allowed)}.")
        if "group" in self.needs and not {"judge", "templates"}.isdisjoint(self.needs):
            raise ValueError(
                f"Reward {self.shown!r}: needs={self.needs!r}: a group's function cannot ask a judge, and is given no "
                "templates."
            )

    @property
    def num_arguments(self) -> int:
        """That the function is given."""
        return 1 if "group" in self.needs else 2 + ("judge" in self.needs) + ("templates" in self.needs)

    def for_evaluation(self) -> Reward:
        """The same, in its rounded form where it has one."""
        return self if self.rounded is None else replace(self, function=self.rounded, rounded=None)


def _accuracy(name: str, function: Callable[..., float], *needs: Need, of_pass: Stage = "first") -> Reward:
    # evaluation may count 0.33 for 1/3; training never does, or rounding would earn what calculating earns
    return Reward(function, of_pass, (*needs, "templates"), name, rounded=functools.partial(function, rounded=True))


REWARDS: Mapping[str, Reward] = {
    "acc": _accuracy("acc", components.accuracy),
    "acc_vis": _accuracy("acc_vis", components.visual_accuracy, "description", of_pass="second"),
    "fmt": Reward(components.first_format, needs=("templates",), shown="fmt", plain="fmt_cot"),
    "fmt_vis": Reward(components.visual_format, "second", ("description", "templates"), "fmt_vis"),
    "leak": Reward(components.leak, needs=("description",), shown="leak"),
    "acc_judge": Reward(
        components.judged_accuracy,
        "second",
        ("description", "judge", "templates"),
        "acc_judge",
        foreseen=components.judged_question,
    ),
    "fmt_cot": Reward(
        components.first_format, needs=("templates",), shown="fmt_cot"
    ),  # of layouts that describe nothing
}
ALWAYS = ("acc", "acc_vis", "leak")  # scored for the metrics, whatever is trained on


def layout_reward(described: bool) -> str:
    """The reward for the layout that the first pass is asked for, with a description or without."""
    return "fmt" if described else REWARDS["fmt"].plain


def own_rewards(described: bool) -> tuple[str, ...]:
    """Our rewards of answers with descriptions, or of such as were never asked for one, that need no judge."""
    names = [name for name, reward in REWARDS.items() if "judge" not in reward.needs]
    if described:
        return tuple(name for name in names if name != layout_reward(False))
    return for_prompt([name for name in names if "description" not in REWARDS[name].needs], False)


def for_prompt(names: Iterable[str], has_images: bool) -> tuple[str, ...]:
    """What is measured of a prompt's answers where `names` are asked for, each once."""
    if has_images:
        return tuple(dict.fromkeys(names))
    return tuple(dict.fromkeys((REWARDS[name].plain or name) if name in REWARDS else name for name in names))
