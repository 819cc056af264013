"""How long a rank may be at one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sr1.config.rules import Range, check_numbers

_MINUTES = Range(0.02, 10**6)  # a second or less is no limit that a busy machine keeps
_LEAST = 1.0  # minutes: of a short timeout, as nobody waits for a rank that is alone
_SHARE = 0.8  # of timeout_minutes: whoever hangs is named before those who wait for it give up


@dataclass(frozen=True)
class WatchdogConfig:
    """Ends a run that hangs, on all ranks, and says which rank stood where. Every number is of one rank, in minutes but
    for `silent_seconds`; null: 0.8 of timeout_minutes, so that the one that hangs is named, not those who wait for it.
    """

    enabled: bool = True  # false: nobody says which rank hangs, and the others wait until a collective gives up
    silent_seconds: float = 30.0  # without a sign of life of a rank's process, which then is found to be stopped
    read: float | None = None  # the next samples of a step
    engine_step: float | None = None  # one forward pass of an engine
    reward: float | None = None  # the grading that is left when all responses are written; null: no end with a judge
    sync: float = 60.0  # the weights to the engines, once
    train: float = 60.0  # the optimizer steps of a rollout step; sft: one
    save: float = 60.0  # without a further byte of a checkpoint that the run waits for
    other: float = 60.0  # without any change: starting, an evaluation, an export

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("read", "engine_step", "reward", "sync", "train", "save", "other"), _MINUTES)
        check_numbers("watchdog", self, {"silent_seconds": Range(5, 10**6), **limits})

    def seconds(self, timeout_minutes: float, reward_seconds: float) -> Mapping[str, float]:
        """The longest that each phase may take, by its name.

        Args:
            reward_seconds: that a group's grading may take; infinite where somebody else is asked, whose patience is
                his own.
        """
        usual = max(_SHARE * timeout_minutes, _LEAST)

        def of(minutes: float | None) -> float:
            return 60 * (usual if minutes is None else minutes)

        return {
            "read": of(self.read),
            "engine step": of(self.engine_step),
            "reward": max(of(self.reward), 3 * reward_seconds) if self.reward is None else of(self.reward),
            "sync": of(self.sync),
            "train": of(self.train),
            "save": of(self.save),
        }
