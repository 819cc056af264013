"""Which steps of a run are looked into, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_sr1.config.rules import Range, check_numbers, one_of, require

ProfileKind = Literal["torch", "nsys", "memory"]


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of steps of `grpo` and `sft`, in `<run_dir>/profile`: docs/training.md."""

    # as in metrics.jsonl, the first is 0: [2, 3] are past what a start compiles; empty: none
    steps: tuple[int, ...] = ()
    # torch: a trace of torch.profiler; nsys: the range that `nsys profile --capture-range=cudaProfilerApi` takes;
    # memory: what each phase takes of memory, on GPUs with a snapshot of all allocations
    kind: ProfileKind = "torch"
    ranks: tuple[int, ...] = (0,)  # that are looked into

    def __post_init__(self) -> None:
        one_of("profile.kind", self.kind, get_args(ProfileKind))
        check_numbers("profile", self, {"steps": Range(0, 10**9), "ranks": Range(0, 10**6)})
        for key, numbers in (("profile.steps", self.steps), ("profile.ranks", self.ranks)):
            require(len(set(numbers)) == len(numbers), key, list(numbers), "each number once", "Correct the list.")


def check_profile(profile: ProfileConfig, num_steps: int | None, num_ranks: int) -> None:
    """Raises ConfigError where a step or a rank is not there, so that nobody waits for its trace.

    Args:
        num_steps: None: not known yet.
    """
    if not profile.steps:
        return
    limits = (("steps", profile.steps, "train.steps", num_steps), ("ranks", profile.ranks, "nproc", num_ranks))
    for key, numbers, limit, value in limits:
        require(
            value is None or all(number < value for number in numbers),
            f"profile.{key}",
            list(numbers),
            f"below {limit}={value}: the first is 0",
            "Correct it, or leave profile.steps empty.",
        )
