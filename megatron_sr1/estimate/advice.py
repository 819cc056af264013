"""What is risky or slow in a configuration that can run. Every line says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_sr1.config import Config, RecomputeConfig, how_to_get, missing_files, typical_tokens
from megatron_sr1.estimate.activations import stage_activations
from megatron_sr1.estimate.arithmetic import prompts_of_group
from megatron_sr1.estimate.machine import GIB
from megatron_sr1.estimate.plan import RunPlan
from megatron_sr1.estimate.step_time import rollout_seconds
from megatron_sr1.platform.precision import shares_prefixes

MIN_HEADROOM = 0.05  # of a GPU that should stay free: the estimate is not better than that
ROOM_FOR_LESS_RECOMPUTE = 0.15
MAX_BUBBLE = 0.2
MAX_IMBALANCE = 0.25
MIN_CONTEXT_TOKENS = 4096  # of a sequence on a context rank; shorter pieces exchange more than they compute
FEW_VISUAL_TOKENS = 16  # of an image, under which no writing can be read
WORTH_MORE_SLOTS = 0.25  # of a rollout
FP8_MULTIPLE = 16  # sides of a matrix that fp8 products take


def advice(plan: RunPlan) -> list[str]:
    """One line for each risky or slow choice, the gravest first."""
    found = [*_missing(plan), *_memory(plan), *_tokens(plan)]
    if plan.stages:
        found += [*_layout(plan), *_stages(plan), *_recompute(plan), *_precision(plan)]
    if plan.engine is not None:
        found += _engine(plan)
    return found


def _missing(plan: RunPlan) -> Iterator[str]:
    files = missing_files(plan.config.model.hf_dir)
    if files:
        yield (
            f"model.hf_dir={plan.config.model.hf_dir!r} lacks {', '.join(files)}: a run stops at once. "
            f"{how_to_get(plan.config.model.hf_dir)}"
        )


def _memory(plan: RunPlan) -> Iterator[str]:
    phase, room = plan.fullest, plan.machine.gpu_gib * GIB
    headroom = 1 - phase.peak / room
    if 0 <= headroom < MIN_HEADROOM:
        yield (
            f"the {phase.name} phase leaves {headroom:.1%} of a GPU free, less than the estimate is exact to. Lower "
            "rollout.kv_cache_gib or train.micro_batch_tokens, or spread the model over more ranks."
        )
    vision = max((stage.activations.vision for stage in plan.stages), default=0.0)
    if vision > 0.2 * room and not plan.config.recompute.vision:
        yield (
            f"a row full of images keeps {vision / GIB:.0f} GiB of vision activations. Set recompute.vision to true: "
            "only the inputs of the tower's blocks are kept then."
        )


def _tokens(plan: RunPlan) -> Iterator[str]:
    config, longest = plan.config, plan.config.rollout.max_model_tokens
    if plan.stages and plan.row_tokens < longest:
        yield (
            f"train.micro_batch_tokens={config.train.micro_batch_tokens} holds rows of {plan.row_tokens} tokens: a "
            f"sequence of rollout.max_model_tokens={longest} would stop the run. Raise the first or lower the other."
        )
    elif plan.stages and plan.row_tokens < 2 * plan.sequence_tokens:
        yield (
            f"train.micro_batch_tokens={config.train.micro_batch_tokens} has room for hardly more than one sequence a "
            f"row (about {plan.sequence_tokens:.0f} tokens each), so rows stay part-filled. Raise it."
        )
    parts = prompts_of_group(config)
    if plan.command == "grpo" and shares_prefixes(config, on_cpu=False) and parts > 1:
        yield (
            f"the rows of train.micro_batch_tokens={config.train.micro_batch_tokens}, or the replicas of an optimizer "
            f"step of train.batch_size={config.train.batch_size} prompts, have a prompt about {parts} times for its "
            f"{config.rollout.samples_per_prompt} samples. Raise the first, or the second."
        )
    if config.model.max_position < longest:
        yield (
            f"model.max_position={config.model.max_position} is less than rollout.max_model_tokens={longest}. Raise it."
        )
    room = longest - config.rollout.max_response_tokens
    largest = (config.model.max_pixels or 0) // plan.model.visual_token_side**2
    if plan.command != "sft" and largest >= room:
        yield (
            f"model.max_pixels={config.model.max_pixels} lets an image take {largest} tokens, and {room} are left to a "
            "prompt (rollout.max_model_tokens - max_response_tokens). Lower the first or raise the second."
        )
    if config.model.max_pixels is not None and largest < FEW_VISUAL_TOKENS:
        yield (
            f"model.max_pixels={config.model.max_pixels} leaves an image {largest} token{'s' if largest > 1 else ''}, "
            f"of {plan.model.visual_token_side} x {plan.model.visual_token_side} pixels: little can be seen. Raise it."
        )
    if plan.command == "grpo" and config.data.max_prompt_tokens > room:  # 0: the engines' limit is that of the data
        yield (
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} lets prompts through that leave no room for a "
            "response: they are read, left out and counted (data/left_out). Set it to "
            f"{room} or less (rollout.max_model_tokens - max_response_tokens), or to 0."
        )


def _layout(plan: RunPlan) -> Iterator[str]:
    config, layout, node = plan.config, plan.config.layout, plan.machine.gpus_per_node
    if layout.tensor > node or (plan.nodes > 1 and node % layout.tensor):
        yield (
            f"layout.tensor={layout.tensor} crosses nodes of {node} GPUs, and each layer waits for the network four "
            "times. Lower it to a divisor of a node's GPUs, and raise layout.pipeline."
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield (
            f"layout.sequence_parallel=false with layout.tensor={layout.tensor} keeps whole hidden states on every "
            "rank, for the same traffic. Set it to true."
        )
    if layout.expert > 1 and layout.expert > node:
        yield (
            f"layout.expert={layout.expert} spreads experts over nodes of {node} GPUs: every layer sends its tokens "
            "over the network. Lower it to a node's GPUs, and raise layout.pipeline."
        )
    if not layout.distributed_optimizer and config.data_ranks * layout.context > 1:
        yield (
            f"layout.distributed_optimizer=false keeps the optimizer state {config.data_ranks * layout.context} times. "
            "Set it to true."
        )
    if layout.context > 1 and config.rollout.max_model_tokens / layout.context < MIN_CONTEXT_TOKENS:
        yield (
            f"layout.context={layout.context} cuts sequences of at most {config.rollout.max_model_tokens} tokens into "
            f"pieces under {MIN_CONTEXT_TOKENS}. Set it to 1, and give the ranks to layout.tensor or to replicas."
        )
    if plan.command == "grpo" and config.train.batch_size < config.data_ranks:
        yield (
            f"train.batch_size={config.train.batch_size} is less than the {config.data_ranks} data-parallel replicas: "
            "groups are cut, and an image is encoded by each replica that trains one of its responses. Raise it, or "
            "give the ranks to layout.tensor or layout.pipeline."
        )
    if plan.command == "sft" and config.train.batch_size % config.data_ranks:
        yield (
            f"train.batch_size={config.train.batch_size} does not divide among {config.data_ranks} data-parallel "
            "replicas: some wait. Make it a multiple."
        )


def _stages(plan: RunPlan) -> Iterator[str]:
    layout = plan.config.layout
    if layout.pipeline == 1:
        return
    bubble = (layout.pipeline - 1) / (layout.virtual * plan.num_rows)
    if bubble > MAX_BUBBLE:
        yield (
            f"about {plan.num_rows} rows a step on {layout.pipeline} pipeline stages: stages idle for {bubble:.0%} of "
            "the computing time, (pipeline - 1) / (virtual * rows). Raise train.batch_size, lower "
            "train.micro_batch_tokens, set layout.virtual to 2, or use fewer stages."
        )
    sizes = [stage.count.total for stage in plan.stages]
    mean = sum(sizes) / len(sizes)
    fullest = max(range(len(sizes)), key=lambda stage: sizes[stage])
    if sizes[fullest] > (1 + MAX_IMBALANCE) * mean:
        cause = "the vision tower and the embedding" if fullest == 0 else "its layers and the head"
        yield (
            f"stage {fullest} holds {sizes[fullest] / mean - 1:.0%} more parameters than the mean, for {cause}. Give "
            f"it fewer layers by layout.stage_layers, now {[sum(stage.count.layers) for stage in plan.stages]}."
        )


def _recompute(plan: RunPlan) -> Iterator[str]:
    recompute = plan.config.recompute
    if recompute.mode == "selective" and set(recompute.modules) == {"core_attn"}:
        yield (
            "recompute.modules=['core_attn'] saves next to nothing: attention keeps no scores here. Name mlp, set "
            "recompute.mode to full, or to none."
        )
    training = plan.phases[0]
    limit = (1 - ROOM_FOR_LESS_RECOMPUTE) * plan.machine.gpu_gib * GIB
    if recompute.mode == "full" and _training_peak(plan, RecomputeConfig("none", vision=recompute.vision)) < limit:
        yield (
            f"recompute.mode='full' costs a forward pass more, and is not needed: without it the {training.name} phase "
            "would fit. Set it to none."
        )


def _training_peak(plan: RunPlan, recompute: RecomputeConfig) -> float:
    config: Config = replace(plan.config, recompute=recompute)
    rows = {"row_tokens": plan.row_tokens, "num_rows": plan.num_rows}
    changes = [
        stage_activations(plan.model, config, stage.count, **rows).total - stage.activations.total
        for stage in plan.stages
    ]
    return max(plan.phases[0].total(stage) + change for stage, change in enumerate(changes))


def _precision(plan: RunPlan) -> Iterator[str]:
    precision, model, tensor = plan.config.precision, plan.model, plan.config.layout.tensor
    if precision.dtype == "fp32":
        yield "precision.dtype='fp32' computes without the GPU's tensor cores at full speed. Set it to bf16."
    if precision.dtype != "fp8":
        return
    width = model.expert_ffn_size if model.num_experts else model.ffn_size // tensor
    sides = {"hidden_size": model.hidden_size, "feed-forward width of a rank": width}
    sides["heads * head_dim of a rank"] = model.num_heads * model.head_dim // tensor
    for name, side in sides.items():
        if side % FP8_MULTIPLE:
            yield (
                f"precision.dtype='fp8' with a {name} of {side}: fp8 products take multiples of {FP8_MULTIPLE}. Change "
                "layout.tensor, or set precision.dtype to bf16."
            )


def _decoding(plan: RunPlan) -> Iterator[str]:
    rollout, engine = plan.config.rollout, plan.engine
    assert engine is not None
    expected = rollout_seconds(plan)
    if not rollout.cuda_graphs:
        yield (
            "rollout.cuda_graphs=false launches every kernel of a decoding step by itself: the rollout of a step takes "
            f"about {expected:,.0f} s, and {rollout_seconds(plan, graphs=True):,.0f} s where it is true."
        )
    twice = rollout_seconds(plan, slots=2 * engine.requests)
    may_grow = rollout.max_running_requests is not None or _has_room(plan, "KV cache", engine.kv_cache)
    if twice < (1 - WORTH_MORE_SLOTS) * expected and may_grow:
        yield (
            f"an engine decodes {engine.requests} requests at a time: the rollout of a step takes about "
            f"{expected:,.0f} s, and {twice:,.0f} s with twice as many. Raise rollout.kv_cache_gib, and set "
            "rollout.max_running_requests to null."
        )


def _has_room(plan: RunPlan, part: str, more: float) -> bool:
    """Whether every phase that holds a part could hold so many bytes more of it."""
    holding = [phase for phase in plan.phases if part in phase.stages[phase.fullest]]
    return all(phase.peak + more <= plan.machine.gpu_gib * GIB for phase in holding)


def _engine(plan: RunPlan) -> Iterator[str]:
    config, rollout, engine = plan.config, plan.config.rollout, plan.engine
    assert engine is not None
    ranks, heads = rollout.engine_tensor, plan.model.num_kv_heads
    mean = sum(typical_tokens(rollout)) / 2
    wanted = engine.requests * mean
    if engine.kv_tokens < wanted:
        yield (
            f"rollout.kv_cache_gib={rollout.kv_cache_gib} holds {engine.kv_tokens:,} tokens, "
            f"rollout.max_running_requests={engine.requests} at {mean:,.0f} tokens take {wanted:,.0f}: requests are "
            "put back and computed again. Raise the first, or set the other to null: as many as fit."
        )
    if plan.stages:
        yield from _decoding(plan)
    if ranks > heads and _has_room(plan, "engine weights", engine.weights * (ranks / heads - 1)):
        yield (
            f"rollout.engine_tensor={ranks} keeps each of {heads} key/value heads {ranks // heads} times. Set it to "
            f"{heads} or less."
        )
    if ranks > plan.machine.gpus_per_node or (plan.nodes > 1 and plan.machine.gpus_per_node % ranks):
        yield (
            f"rollout.engine_tensor={ranks} crosses nodes of {plan.machine.gpus_per_node} GPUs: every token waits for "
            "the network. Set it to a divisor of a node's GPUs."
        )
    if plan.stages and not rollout.sleep:
        yield "rollout.sleep=false keeps the engine's memory while the policy trains. Set it to true."
    if plan.stages and rollout.dynamic_sampling and config.objective.advantage_scope == "batch":
        yield (
            f"rollout.dynamic_sampling={rollout.dynamic_sampling} replaces nothing where the responses to a prompt are "
            "compared with the whole batch: set objective.advantage_scope to group, or it to 0."
        )
    engines = config.nproc // ranks
    if plan.stages and rollout.prompts_per_step < engines:
        yield (
            f"rollout.prompts_per_step={rollout.prompts_per_step} leaves some of {engines} engines without work. Raise "
            "it, or rollout.engine_tensor."
        )
