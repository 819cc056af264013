"""What a command refuses of its configuration and of its model's, before any process starts.

`check_command` is all of it, for the command and for its dry run alike: the verdict on memory is the dry run's alone.
"""

from __future__ import annotations

from typing import Literal

from megatron_sr1.config.engine_arguments import check_batched_tokens, check_engine_arguments
from megatron_sr1.config.families import HfConfig, LinearAttention
from megatron_sr1.config.freeze import check_parts
from megatron_sr1.config.hf_config import read_hf_config
from megatron_sr1.config.model import PrecisionConfig
from megatron_sr1.config.pixels import check_pixels
from megatron_sr1.config.rollout import running_requests
from megatron_sr1.config.router_replay import check_router_replay
from megatron_sr1.config.rules import ConfigError, require
from megatron_sr1.config.tracking import check_trackers
from megatron_sr1.config.whole import Config

Command = Literal["sft", "grpo", "evaluate"]


def check_command(command: Command, config: Config) -> None:
    """
    Raises:
        ConfigError: see the functions below.
    """
    check_model(config)
    rollout = config.rollout
    check_pixels(config.model, None if command == "sft" else rollout.max_model_tokens - rollout.max_response_tokens)
    row_tokens(config)
    check_trackers(config.track)
    if command == "grpo":
        check_train_batch(config)
        check_router_replay(config)
    check_length(command, config)
    require(
        command != "sft" or config.train.batch_size >= config.data_ranks,
        "train.batch_size",
        config.train.batch_size,
        f"at least the {config.data_ranks} data-parallel replicas of nproc={config.nproc}",
        "Raise it, or give the ranks to layout.tensor or layout.pipeline.",
    )
    require(
        command != "sft" or not config.train.keep_best,
        "train.keep_best",
        config.train.keep_best,
        "empty for sft, which evaluates nothing",
        "Leave it out.",
    )
    if command != "sft":
        check_engine(config)


def check_length(command: Command, config: Config) -> None:
    """Whether it can be known how many steps train.epochs comes to; what is evaluated on the way."""
    train, data = config.train, config.data
    name, weights = ("train", data.train_weights) if command == "grpo" else ("cold_start", data.cold_start_weights)
    require(
        command == "evaluate" or train.epochs is None or not weights,
        "train.epochs",
        train.epochs,
        f"null with data.{name}_weights: the parts of a mixture end one after the other",
        "Set train.steps.",
    )
    require(
        command != "grpo" or train.epochs is None or not config.rollout.dynamic_sampling,
        "train.epochs",
        train.epochs,
        f"null with rollout.dynamic_sampling={config.rollout.dynamic_sampling}: a step draws what it needs",
        "Set train.steps.",
    )
    require(
        command != "grpo" or not train.heldout_every,
        "train.heldout_every",
        train.heldout_every,
        "0 for grpo, whose evaluations answer the prompts of data.heldout",
        "Set train.evaluate_every.",
    )
    require(
        command != "sft" or not train.heldout_every or bool(data.heldout),
        "train.heldout_every",
        train.heldout_every,
        "0 without data.heldout",
        "Name demonstrations in data.heldout that are not trained on.",
    )


def check_model(config: Config) -> None:
    """What the model's own config.json says about the layout; no weights are read.

    Raises:
        ConfigError: what `read_hf_config` refuses, settings that are not supported, or heads, layers, experts or
            widths that the layout or an engine's ranks do not divide; bf16 layers that it does not have; parts that
            cannot be frozen together.
    """
    model, layout = read_hf_config(config.model.hf_dir), config.layout
    model.check_supported()
    check_parts(config.model.freeze, config.optimizer.vision_lr, model)
    heads, layers = ("num_attention_heads", model.num_heads), ("num_hidden_layers", model.num_layers)
    _check_division("layout.tensor", layout.tensor, *heads)
    width = "shared_expert_intermediate_size" if model.shared_expert_size else "intermediate_size"
    _check_division("layout.tensor", layout.tensor, width, model.ffn_size)
    for part in (heads, (width, model.ffn_size), ("moe_intermediate_size", model.expert_ffn_size)):
        _check_division("rollout.engine_tensor", config.rollout.engine_tensor, *part)
    require(
        model.num_kv_heads % layout.tensor == 0 or layout.tensor % model.num_kv_heads == 0,
        "layout.tensor",
        layout.tensor,
        f"a divisor or a multiple of the model's num_key_value_heads={model.num_kv_heads}",
        "Ranks share key/value heads evenly.",
    )
    if layout.stage_layers:
        require(
            sum(layout.stage_layers) == model.num_layers,
            "layout.stage_layers",
            layout.stage_layers,
            f"{layout.num_chunks} numbers that add up to the model's num_hidden_layers={model.num_layers}",
            "Change them, or leave the key out for equal chunks.",
        )
    else:
        _check_division("layout.pipeline * layout.virtual", layout.num_chunks, *layers, " or set layout.stage_layers")
    if model.num_experts:
        _check_division("layout.expert", layout.expert, "num_experts", model.num_experts)
        require(
            layout.tensor == 1 or layout.sequence_parallel,
            "layout.sequence_parallel",
            layout.sequence_parallel,
            "true for a mixture of experts with layout.tensor above 1",
            "Without it every tensor-parallel rank would send every token to the experts.",
        )
    else:
        require(layout.expert == 1, "layout.expert", layout.expert, "1: the model has no experts", "Leave it out.")
    check_bf16_layers(config.precision, model.num_layers, layout.pipeline)
    if model.linear is not None:
        _check_linear(config, model.linear)


def _check_linear(config: Config, linear: LinearAttention) -> None:
    """What layers with a recurrent state do not take."""
    heads, layout = ("linear_num_key_heads", linear.num_key_heads), config.layout
    _check_division("layout.tensor", layout.tensor, *heads)
    _check_division("rollout.engine_tensor", config.rollout.engine_tensor, *heads)
    model = "for a model with layers of a gated delta rule (layer_types: linear_attention)"
    require(
        layout.context == 1,
        "layout.context",
        layout.context,
        f"1 {model}",
        "Raise layout.tensor, or shorten rows with train.micro_batch_tokens.",
    )
    dtype = config.precision.dtype
    require(dtype != "fp8", "precision.dtype", dtype, f"bf16 or fp32 {model}", "Set it to bf16.")


def _check_division(key: str, ranks: int, name: str, size: int, otherwise: str = "") -> None:
    require(size % ranks == 0, key, ranks, f"a divisor of the model's {name}={size}", f"Change {key}{otherwise}.")


def check_bf16_layers(precision: PrecisionConfig, num_layers: int, pipeline: int) -> None:
    """Whether the layers that FP8 leaves in bf16 exist.

    Megatron-Core wants each end's within what one of `pipeline` equal stages would hold.

    Raises:
        ConfigError: there are more of them than layers.
    """
    if precision.dtype != "fp8":
        return
    first, last = precision.bf16_first_layers, precision.bf16_last_layers
    allowed = num_layers // pipeline
    for name, number in (("bf16_first_layers", first), ("bf16_last_layers", last)):
        if number > allowed:
            raise ConfigError(
                f"precision.{name}={number} is not allowed: {num_layers} layers on {pipeline} pipeline stages leave "
                f"at most {allowed}. Lower it."
            )
    if first + last >= num_layers:
        raise ConfigError(
            f"precision.bf16_first_layers + precision.bf16_last_layers = {first + last} is not allowed: of the model's "
            f"{num_layers} layers none would be FP8. Lower them, or set precision.dtype to bf16."
        )


def check_engine(config: Config) -> None:
    """Whether an engine's ranks can share the model, and its KV cache hold the longest sequence.

    Raises:
        ConfigError: key/value heads that do not divide; a cache that is too small; see `check_engine_arguments` and
            `check_batched_tokens`.
    """
    check_engine_arguments(config.rollout.engine)
    rollout, model = config.rollout, read_hf_config(config.model.hf_dir)
    heads = model.num_kv_heads
    require(
        heads % rollout.engine_tensor == 0 or rollout.engine_tensor % heads == 0,
        "rollout.engine_tensor",
        rollout.engine_tensor,
        f"a divisor or a multiple of the model's num_key_value_heads={heads}",
        "The engine's ranks share key/value heads evenly.",
    )
    token_bytes, request_bytes = (size(model, rollout.engine_tensor) for size in (kv_token_bytes, kv_request_bytes))
    num_tokens = max(0, int(rollout.kv_cache_gib * 2**30) - request_bytes) // token_bytes
    if num_tokens < rollout.max_model_tokens:
        raise ConfigError(
            f"rollout.kv_cache_gib={rollout.kv_cache_gib} is not allowed: it holds {num_tokens} tokens, and must "
            f"hold a sequence of rollout.max_model_tokens={rollout.max_model_tokens}. Raise it, or lower the other."
        )
    check_batched_tokens(rollout, running_requests(rollout, token_bytes, request_bytes))


def kv_token_bytes(model: HfConfig, ranks: int, *, element: int = 2) -> int:
    """Keys and values of one token on one of the `ranks` of an engine, which share the heads or repeat them.

    Args:
        element: bytes of a value: bf16's, by default.
    """
    return 2 * model.num_attention_layers * max(1, model.num_kv_heads // ranks) * model.head_dim * element


def kv_request_bytes(model: HfConfig, ranks: int, *, element: int = 2) -> int:
    """What a request takes of the cache of one of the `ranks` of an engine, however long it is: the states of recurrent
    layers, in fp32, and the last inputs of their convolutions."""
    if model.linear is None:
        return 0
    linear, layers = model.linear, sum(model.linear_layers)
    state = 4 * linear.num_value_heads * linear.key_dim * linear.value_dim
    inputs = element * (linear.taps - 1) * linear.num_key_heads * linear.channels_per_key
    return layers * (state + inputs) // ranks


def check_train_batch(config: Config) -> None:
    """What must divide before a GRPO run starts.

    Raises:
        ConfigError: prompts do not split into mini-batches; a group of one, whose advantage is always 0.
    """
    require(
        config.rollout.samples_per_prompt > 1 or config.objective.advantage_scope == "batch",
        "rollout.samples_per_prompt",
        config.rollout.samples_per_prompt,
        "2 or more where objective.advantage_scope is group: one response alone is always at the mean of its group",
        "8 is common.",
    )
    require(
        config.rollout.prompts_per_step % config.train.batch_size == 0,
        "train.batch_size",
        config.train.batch_size,
        f"a divisor of rollout.prompts_per_step={config.rollout.prompts_per_step}",
        "It is the number of prompts of one optimizer step.",
    )
    several = config.rollout.prompts_per_step > config.train.batch_size
    require(
        not several or config.objective.old != "none" or config.objective.mismatch != "none",
        "objective.old",
        config.objective.old,
        "trainer or generator where a step has several optimizer steps, of which all but the first are off-policy",
        "Or let weights correct for it: objective.mismatch=truncate.",
    )


def row_tokens(config: Config) -> int:
    """Tokens of a packed row: train.micro_batch_tokens, rounded down to what rows are padded to.

    Raises:
        ConfigError: it has no room for a row of the layout.
    """
    budget, multiple = config.train.micro_batch_tokens, config.row_multiple
    require(
        budget >= multiple,
        "train.micro_batch_tokens",
        budget,
        f"at least {multiple}, the multiple that layout.context, layout.tensor with layout.sequence_parallel, and the "
        "fp8 recipe pad every row to",
        "Raise it, or use a smaller layout.",
    )
    return budget - budget % multiple
