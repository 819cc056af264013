"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_sr1.estimate.arithmetic import FLOPS_PER_SECOND
from megatron_sr1.estimate.machine import GIB
from megatron_sr1.estimate.plan import Phase, RunPlan, offloaded
from megatron_sr1.estimate.step_time import StepTime, step_time

SUPPOSED = (
    "measured are the rate of training, on one H200, and the cost of ledgers, on a CPU; lengths, decoding, networks "
    "and disks are supposed, as estimate/step_time.py says"
)


def plan_text(plan: RunPlan, warnings: Sequence[str]) -> str:
    """What runs where, a table of bytes for every phase, and the warnings."""
    lines = [*_heading(plan)]
    for phase in plan.phases:
        lines += ["", *_phase(plan, phase)]
    lines += ["", _host(plan)]
    lines.append("")
    lines += [f"warning: {warning}" for warning in warnings] or ["no warnings"]
    return "\n".join(lines)


def _heading(plan: RunPlan) -> Iterator[str]:
    config, layout = plan.config, plan.config.layout
    nodes = f"{plan.nodes} nodes" if plan.nodes > 1 else "1 node"
    yield f"{plan.command}: {config.model.hf_dir}, {config.nproc} GPUs of {plan.machine.gpu_gib:g} GiB, {nodes}"
    if plan.stages:
        parts = {"tensor": layout.tensor, "pipeline": layout.pipeline, "virtual": layout.virtual}
        parts |= {"context": layout.context, "expert": layout.expert}
        written = " x ".join(f"{name} {size}" for name, size in parts.items() if size > 1) or "whole on each rank"
        sequence = ", sequence parallel" if layout.sequence_parallel else ""
        yield f"policy: {written}{sequence}, data {config.data_ranks}, {_precision(plan)}, {_recompute(plan)}"
        yield _batch(plan)
        yield _arithmetic(plan)
    if plan.engine is not None:
        rollout = config.rollout
        yield (
            f"engines: {config.nproc // rollout.engine_tensor} of {rollout.engine_tensor} ranks, each with a KV cache "
            f"of {plan.engine.kv_tokens:,} tokens for {plan.engine.requests} requests"
        )
        if plan.stages and (away := offloaded(plan.config)):
            freed = max(sum(getattr(stage.state, name) for name in away) for stage in plan.stages)
            yield f"offload: {', '.join(away)}, {freed / GIB:.1f} GiB of a rank, leave while engines generate"
    expected = step_time(plan)
    if expected is not None:
        yield f"expected step: {time_text(expected)}; {SUPPOSED}"


def time_text(expected: StepTime) -> str:
    """Its seconds, and those of its terms."""
    parts = ", ".join(f"{name} {seconds:,.3g}" for name, seconds in expected.terms.items() if seconds)
    return f"{expected.total:,.0f} s: {parts}"


def _precision(plan: RunPlan) -> str:
    precision = plan.config.precision
    return f"fp8 {precision.fp8_recipe}" if precision.dtype == "fp8" else precision.dtype


def _recompute(plan: RunPlan) -> str:
    recompute = plan.config.recompute
    what = {"none": "no recomputation", "selective": f"recomputed: {', '.join(recompute.modules)}"}
    text = what.get(recompute.mode, f"recomputed: {'all layers' if recompute.mode == 'full' else 'first layers'}")
    return f"{text}{' and vision blocks' if recompute.vision else ''}"


def _batch(plan: RunPlan) -> str:
    config = plan.config
    if plan.command == "sft":
        batch = f"{config.train.batch_size} samples"
    else:
        updates = config.rollout.prompts_per_step // config.train.batch_size
        rounds = config.rollout.dynamic_sampling
        further = f" (and further prompts in at most {rounds} round{'s' if rounds > 1 else ''})" if rounds else ""
        batch = (
            f"{config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples{further} in "
            f"{updates} optimizer step{'s' if updates > 1 else ''}"
        )
    return (
        f"step: {batch}; about {plan.num_rows} rows of {plan.row_tokens:,} tokens for each replica in one optimizer "
        f"step, at {plan.sequence_tokens:,.0f} tokens a sequence"
    )


def _arithmetic(plan: RunPlan) -> str:
    total = sum(plan.flops.values())
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in plan.flops.items())
    seconds = total / (plan.config.nproc * FLOPS_PER_SECOND)
    return (
        f"arithmetic: training takes {total / 1e15:,.3g} PFLOP a step ({parts}), {seconds:,.2g} s at "
        f"{FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s a GPU, which is taken from one H200 in bf16; bubbles and communication "
        "come on top"
    )


def _phase(plan: RunPlan, phase: Phase) -> Iterator[str]:
    """One column for each stage, one row for each kind of bytes."""
    stages = range(len(phase.stages))
    headings = [f"stage {stage}" for stage in stages] if plan.stages else ["rank"]
    yield f"{f'{phase.name}, GiB of a rank':<28}" + "".join(f"{heading:>10}" for heading in headings)
    if plan.stages and phase is plan.phases[0]:
        yield _row("  layers", [f"{sum(stage.count.layers)}" for stage in plan.stages])
        yield _row("  parameters, millions", [f"{stage.count.total / 1e6:,.0f}" for stage in plan.stages])
        if plan.config.model.freeze:
            yield _row("  of these trained", [f"{stage.count.trained / 1e6:,.0f}" for stage in plan.stages])
        yield _row("  rows in flight", [f"{stage.activations.rows_in_flight:g}" for stage in plan.stages])
    for name in phase.stages[0]:
        values = [bytes_of[name] for bytes_of in phase.stages]
        if any(values):
            label = {"layers": "activations of layers", "working": "recomputed and passing"}.get(name, name)
            yield _row(f"  {label}", [f"{value / GIB:.1f}" for value in values])
    totals = [phase.total(stage) for stage in stages]
    yield _row("  total", [f"{total / GIB:.1f}" for total in totals])
    yield _row("  free", [f"{plan.machine.gpu_gib - total / GIB:.1f}" for total in totals])


def _host(plan: RunPlan) -> str:
    parts = ", ".join(f"{name} {value / GIB:.0f}" for name, value in plan.host.items() if value)
    total = sum(plan.host.values()) / GIB
    return f"host memory of a node: {total:.0f} of {plan.machine.host_gib:g} GiB: {parts}"


def _row(label: str, values: list[str]) -> str:
    return f"{label:<28}" + "".join(f"{value:>10}" for value in values)
