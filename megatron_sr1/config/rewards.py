"""How responses are graded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_sr1.config.judge import JudgeConfig
from megatron_sr1.config.rules import Range, check_numbers, one_of

OnError = Literal["stop", "skip_group"]


@dataclass(frozen=True)
class RewardsConfig:
    """The processes beside each rank that compute the rewards."""

    on_error: OnError = "stop"  # of a reward, with a checkpoint; skip_group: that group is not trained on, and counted
    seconds: float = 120.0  # that a group may take in one process, and once more in another
    workers: int | None = None  # processes of a rank; null: an eighth of the CPUs, from 2 to 4
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        check_numbers("rewards", self, {"seconds": Range(0, 86_400, above=True), "workers": Range(1, 1000)})
        one_of("rewards.on_error", self.on_error, get_args(OnError))
