"""The memory of every phase of a command, on every pipeline stage, from the configuration and the model's config.json.

    training    trainer state + activations, and the engine where it does not sleep
    checkpoint  trainer state + what is gathered of it, and the engine where it does not sleep
    sync        trainer state + the engine's weights + what a weight sync takes
    rollout     trainer state + engine
    start-up    trainer state + engine, which is awake, + its first weight sync

In the last three the trainer state is without what config.offload takes away.

A step's rows are not known before it is made. They are counted as if a first pass took half of rollout.max_model_tokens
and a second pass half of the longest description and response; with train.shared_prefix prompts of first passes are
there once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sr1.config import Command, Config, ConfigError, row_tokens, typical_tokens
from megatron_sr1.config.rollout import TYPICAL
from megatron_sr1.estimate.activations import StageActivations, kept_experts, stage_activations
from megatron_sr1.estimate.arithmetic import prompts_of_group, training_flops
from megatron_sr1.estimate.engine import EngineBytes, engine_bytes
from megatron_sr1.estimate.host import host_bytes
from megatron_sr1.estimate.machine import GIB, Machine
from megatron_sr1.estimate.saved import WholeCount
from megatron_sr1.estimate.state import TrainerState, gathered_bytes, trainer_state
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.frozen import check_shares, read_frozen
from megatron_sr1.policy.parameter_counts import StageCount, count_stages
from megatron_sr1.policy.read import read_architecture
from megatron_sr1.streams import preset_of

RUNTIME_GIB = 4.0  # device context, communication buffers, library workspaces, fragments: taken as given, not derived


@dataclass(frozen=True)
class StagePlan:
    """A rank of a pipeline stage."""

    count: StageCount
    state: TrainerState
    activations: StageActivations
    expert_ids: float  # bytes of what a mixture's routers chose in a step


@dataclass(frozen=True)
class Phase:
    """Named bytes of a rank of every pipeline stage."""

    name: str
    stages: tuple[Mapping[str, float], ...]

    @property
    def fullest(self) -> int:
        """The stage whose ranks hold most."""
        return max(range(len(self.stages)), key=self.total)

    @property
    def peak(self) -> float:
        """Bytes of a rank of the fullest stage."""
        return self.total(self.fullest)

    def total(self, stage: int) -> float:
        """Bytes of a rank of the stage."""
        return sum(self.stages[stage].values())


@dataclass(frozen=True)
class RunPlan:
    """A command's memory. Without training there are no stages, without generation there is no engine."""

    command: str
    config: Config
    machine: Machine
    model: Architecture
    nodes: int
    row_tokens: int
    sequence_tokens: float  # mean length of a sequence of a step, supposed
    num_rows: int  # of a data-parallel replica in an optimizer step, about
    stages: tuple[StagePlan, ...]
    engine: EngineBytes | None
    phases: tuple[Phase, ...]
    host: Mapping[str, float]  # named bytes of a node's host memory
    flops: Mapping[str, float]  # named floating-point operations of training in a step, all GPUs

    @property
    def fullest(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.peak)


def make_plan(
    command: Command, config: Config, machine: Machine, counted: Sequence[StageCount] | None = None
) -> RunPlan:
    """The plan of a command whose configuration `config.check_command` has passed.

    Args:
        counted: a rank of every pipeline stage, see `Scorer.stage_counts`; None: they are counted here, for which this
            process must be alone.

    Raises:
        ConfigError: nodes that would be filled in part; what `model.freeze` names is not there, all there is, or all of
            a pipeline stage.
    """
    model, rows = read_architecture(config.model.hf_dir), row_tokens(config)
    length, tokens = _sequences(command, config)
    num_rows = max(1, math.ceil(tokens / config.data_ranks / rows))
    stages: tuple[StagePlan, ...] = ()
    if command != "evaluate":
        counts = counted or count_stages(config.model.hf_dir, config.layout, config.nproc, config.model.freeze)
        trained = [(count.trained_experts, count.trained - count.trained_experts) for count in counts]
        check_shares(config.model.freeze, trained, "pipeline stage")
        read_frozen(model, config)
        stages = tuple(_stage(model, config, count, command, rows, num_rows) for count in counts)
    whole = None if counted is None else WholeCount.of(counted, config)
    engine = None if command == "sft" else engine_bytes(model, config, whole=whole)
    phases = tuple(_phases(config, stages, engine))
    nodes = machine.nodes(config.nproc)
    states = [stage.state for stage in stages]
    counts = [stage.count for stage in stages]
    host = host_bytes(config, machine, model, states, counts, generates=engine is not None, whole=whole)
    flops = training_flops(command, config, model)
    return RunPlan(command, config, machine, model, nodes, rows, length, num_rows, stages, engine, phases, host, flops)


def check_fits(plan: RunPlan) -> None:
    """
    Raises:
        ConfigError: a phase takes more than a GPU has, or the ranks of a node more than its host memory; the message
            names what is largest and what would help.
    """
    phase, host = plan.fullest, sum(plan.host.values())
    if phase.peak <= plan.machine.gpu_gib * GIB:
        if host > plan.machine.host_gib * GIB:
            largest = max(plan.host, key=lambda name: plan.host[name])
            raise ConfigError(
                f"the ranks of a node take about {host / GIB:.0f} GiB of host memory, more than its "
                f"{plan.machine.host_gib:g} GiB (--host-gib). Most of it: {largest}, "
                f"{plan.host[largest] / GIB:.0f} GiB. {_HOST_REMEDIES[largest]}"
            )
        return
    parts = phase.stages[phase.fullest]
    largest = max(parts, key=lambda name: parts[name])
    raise ConfigError(
        f"the {phase.name} phase takes about {phase.peak / GIB:.1f} GiB on a rank of stage {phase.fullest}, more than "
        f"the {plan.machine.gpu_gib:g} GiB of a GPU. Most of it: {largest}, {parts[largest] / GIB:.1f} GiB. "
        f"{_REMEDIES[largest]}"
    )


_SPREAD = "Raise layout.tensor or layout.pipeline, with nproc where that is needed."
_REMEDIES = {
    "weights": _SPREAD,
    "fp8 copies": "Set precision.dtype to bf16.",
    "gradients": _SPREAD,
    "optimizer": "Raise nproc: data-parallel ranks share it where layout.distributed_optimizer is on.",
    "reference": "Set objective.kl_coef to 0 to train without one, or raise layout.tensor or layout.pipeline.",
    "layers": "Set recompute.mode to full, lower train.micro_batch_tokens, or raise layout.tensor with "
    "layout.sequence_parallel.",
    "vision": "Set recompute.vision to true, or lower train.micro_batch_tokens.",
    "head": "Lower train.micro_batch_tokens.",
    "working": "Lower train.micro_batch_tokens or recompute.layers.",
    "expert ids": "Raise layout.pipeline, or nproc.",
    "engine weights": "Raise rollout.engine_tensor.",
    "KV cache": "Lower rollout.kv_cache_gib.",
    "engine forward": "Lower rollout.max_running_requests, or raise rollout.engine_tensor.",
    "decoding graphs": "Lower rollout.max_running_requests, or set rollout.cuda_graphs to false.",
    "weight sync": "Lower rollout.sync_bucket_mib.",
    "gathered": _SPREAD,
    "runtime": "No model fits such a GPU.",
}
_HOST_REMEDIES = {
    "offload": "Set offload.optimizer or offload.reference to false where the GPUs have room.",
    "checkpoint": "Raise layout.pipeline, with nproc where that is needed.",
    "patches": "Run fewer ranks on a node.",
    "images": "Lower rollout.prompts_per_step, rollout.dynamic_sampling or rollout.max_model_tokens.",
    "read ahead": "Lower data.prefetch_mib.",
    "processes": "Run fewer ranks on a node.",
}


def offloaded(config: Config) -> list[str]:
    """The parts of the trainer's state that leave a GPU while engines generate."""
    return [name for name, wanted in vars(config.offload).items() if wanted is not False]


def _sequences(command: str, config: Config) -> tuple[float, float]:
    """Mean length of the sequences of one optimizer step, and the tokens of their rows."""
    rollout = config.rollout
    first, second = typical_tokens(rollout)
    if command == "sft":  # half of the demonstrations see an image
        length = (first + second) / 2
        return length, length * config.train.batch_size
    preset = preset_of(config)
    trained = sum(later.samples for later in preset.passes.later if preset.trains(later.name))
    number = config.train.batch_size * rollout.samples_per_prompt * (1 + trained)
    length = (first + trained * second) / (1 + trained)
    prompt = max(0.0, first - TYPICAL * rollout.max_response_tokens)
    repeated = rollout.samples_per_prompt - prompts_of_group(config)  # prompts that are not there once more
    return length, length * number - config.train.batch_size * repeated * prompt


def _stage(model: Architecture, config: Config, count: StageCount, command: str, rows: int, num_rows: int) -> StagePlan:
    keep_reference = command == "grpo" and preset_of(config).needs_reference
    state = trainer_state(count, config, keep_reference=keep_reference)
    activations = stage_activations(model, config, count, row_tokens=rows, num_rows=num_rows)
    updates = config.rollout.prompts_per_step / config.train.batch_size
    ids = kept_experts(model, config, count, updates * num_rows * rows) if command == "grpo" else 0.0
    return StagePlan(count, state, activations, ids)


def _phases(config: Config, stages: tuple[StagePlan, ...], engine: EngineBytes | None) -> list[Phase]:
    runtime = {"runtime": RUNTIME_GIB * GIB} | ({"decoding graphs": float(engine.graphs)} if engine else {})
    serving: dict[str, float] = {}
    if engine is not None:
        serving = {"engine weights": engine.weights, "KV cache": engine.kv_cache, "engine forward": engine.forward}
    if not stages:
        return [Phase("generation", ({**serving, **runtime},))]
    states = [{name: float(value) for name, value in vars(stage.state).items()} for stage in stages]
    awake = {} if config.rollout.sleep else {name: serving[name] for name in serving if name != "engine forward"}
    training, saving = [], []
    for state, stage in zip(states, stages, strict=True):
        kept = {name: getattr(stage.activations, name) for name in ("layers", "vision", "head", "working")}
        ids = {"expert ids": stage.expert_ids} if stage.expert_ids else {}
        training.append({**state, **kept, **ids, **awake, **runtime})
        saving.append({**state, "gathered": float(gathered_bytes(stage.count, config)), **awake, **runtime})
    phases = [Phase("training", tuple(training)), Phase("checkpoint", tuple(saving))]
    if engine is None:
        return phases
    incoming = {"engine weights": float(engine.weights), "weight sync": float(engine.sync)}
    away = dict.fromkeys(offloaded(config), 0.0)
    cache = {"KV cache": float(engine.kv_cache)}
    asleep = {} if config.rollout.sleep else cache
    for name, held in (
        ("weight sync", {**incoming, **asleep}),
        ("rollout", serving),
        ("start-up", {**incoming, **cache}),
    ):
        phases.append(Phase(name, tuple({**state, **away, **held, **runtime} for state in states)))
    return phases
