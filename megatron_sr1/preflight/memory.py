"""The memory that a run is planned to take, against what the machines have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_sr1.config import Command, Config, ConfigError
from megatron_sr1.estimate import Machine, RunPlan, advice, check_fits, make_plan
from megatron_sr1.policy.parameter_counts import StageCount
from megatron_sr1.preflight.facts import RankFacts
from megatron_sr1.preflight.rows import Row, not_checked

GIB = 2**30
CPU_PROCESS_GIB = 1.0  # interpreter and libraries of a rank without an accelerator, which forked ranks share in part
# what there is only beside an accelerator, of the host and of a rank, or is counted by CPU_PROCESS_GIB
_OF_CARDS = ("offload", "processes", "runtime", "decoding graphs")


def memory_rows(
    command: Command, config: Config, counts: Sequence[StageCount], facts: Sequence[RankFacts]
) -> list[Row]:
    """Every phase against the smallest card, and the fullest machine's ranks against its memory.

    Args:
        counts: of a rank of every pipeline stage.
        facts: of all ranks.
    """
    ranks = Counter(fact.host for fact in facts)
    smallest = min(facts, key=lambda fact: fact.host_total)
    host_gib, card = smallest.host_total / GIB, min(fact.card_total for fact in facts)
    try:
        machine = Machine(card / GIB or host_gib, max(ranks.values()), host_gib)
        plan = make_plan(command, config, machine, counts)
    except ConfigError as error:  # machines that the ranks fill unevenly
        return [not_checked("memory", str(error))]
    return [_on_cpu(plan, smallest, max(ranks.values()))] if not card else _on_cards(plan)


def _on_cards(plan: RunPlan) -> list[Row]:
    card, host = plan.machine.gpu_gib, plan.machine.host_gib
    phases = ", ".join(f"{phase.name} {phase.peak / GIB:.1f}" for phase in plan.phases)
    found = f"of {card:.1f} GiB of a card: {phases}"
    of_host = f"about {sum(plan.host.values()) / GIB:.0f} of {host:.0f} GiB of a node"
    try:
        check_fits(plan)
    except ConfigError as error:
        if plan.fullest.peak <= card * GIB:
            return [Row("card memory", "pass", found), Row("host memory", "fail", of_host, str(error))]
        return [Row("card memory", "fail", found, str(error)), Row("host memory", "pass", of_host)]
    tight = [line for line in advice(plan) if "of a GPU free" in line]
    return [Row("card memory", "warn" if tight else "pass", found, *tight[:1]), Row("host memory", "pass", of_host)]


def _on_cpu(plan: RunPlan, tightest: RankFacts, ranks: int) -> Row:
    """What would be on cards is on the host."""
    phase = plan.fullest
    of_rank = _without_cards(phase.stages[phase.fullest]) + CPU_PROCESS_GIB
    shared = _without_cards(plan.host)
    needed, total, free = ranks * of_rank + shared, tightest.host_total / GIB, tightest.host_free / GIB
    found = f"about {needed:.1f} GiB for {ranks} ranks ({phase.name}), of {total:.1f} GiB, {free:.1f} free"
    remedy = "Lower train.micro_batch_tokens or rollout.kv_cache_gib, or start fewer ranks."
    if needed > total:
        return Row("host memory", "fail", found, remedy)
    return Row("host memory", "warn", found, remedy) if needed > free else Row("host memory", "pass", found)


def _without_cards(parts: Mapping[str, float]) -> float:
    """GiB."""
    return sum(size for name, size in parts.items() if name not in _OF_CARDS) / GIB
