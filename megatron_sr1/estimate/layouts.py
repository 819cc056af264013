"""The layouts that a number of GPUs allows, by the time that a step is expected to take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_sr1.config import Config, ConfigError
from megatron_sr1.estimate.machine import GIB, Machine
from megatron_sr1.estimate.plan import RunPlan, check_fits, make_plan
from megatron_sr1.estimate.step_time import StepTime, step_time

SIZES = (1, 2, 4, 8)  # of tensor, pipeline and engine_tensor that are tried


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    base: Config  # that it was made of
    tensor: int
    pipeline: int
    engine_tensor: int
    plan: RunPlan
    expected: StepTime

    @property
    def overrides(self) -> list[str]:
        """What the configuration needs for it."""
        return layout_overrides(self.base, self.plan.config.nproc, self.tensor, self.pipeline, self.engine_tensor)

    @property
    def gib(self) -> float:
        """Of the rank that holds most, in its fullest phase."""
        return self.plan.fullest.peak / GIB


def layout_overrides(base: Config, num_gpus: int, tensor: int, pipeline: int, engine_tensor: int) -> list[str]:
    """Words of a command line. Sequence parallelism goes with tensor parallelism; another number of stages than that of
    `base` has equal ones."""
    equal = ["layout.virtual=1", "layout.stage_layers=[]"]
    return [
        f"nproc={num_gpus}",
        f"layout.tensor={tensor}",
        f"layout.sequence_parallel={str(tensor > 1).lower()}",
        f"layout.pipeline={pipeline}",
        *(equal if pipeline != base.layout.pipeline else []),
        f"rollout.engine_tensor={engine_tensor}",
    ]


def candidates(base: Config, load: Callable[[list[str]], Config], num_gpus: int, machine: Machine) -> list[Candidate]:
    """Those of a GRPO run, the fastest first; layouts that are refused or do not fit are left out.

    Args:
        base: the configuration.
        load: the same with further overrides; raises ConfigError for what cannot run.
    """
    found = list(_fitting(base, load, num_gpus, machine))
    return sorted(found, key=lambda one: (one.expected.total, one.tensor * one.pipeline, one.engine_tensor))


def _fitting(base: Config, load: Callable[[list[str]], Config], num_gpus: int, machine: Machine) -> Iterator[Candidate]:
    for tensor, pipeline, engine_tensor in itertools.product(SIZES, repeat=3):
        crosses = max(tensor, engine_tensor) > machine.gpus_per_node
        if crosses or num_gpus % (tensor * pipeline) or num_gpus % engine_tensor:
            continue
        try:
            config = load(layout_overrides(base, num_gpus, tensor, pipeline, engine_tensor))
            plan = make_plan("grpo", config, machine)
            check_fits(plan)
        except ConfigError:
            continue
        expected = step_time(plan)
        assert expected is not None, "a GRPO run has engines and a trainer"
        yield Candidate(base, tensor, pipeline, engine_tensor, plan, expected)
