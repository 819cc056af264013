"""What a configuration must agree on with the model's own, and what must hold before a GRPO run starts."""

from __future__ import annotations

from megatron_sr1.config.hf_config import read_hf_config
from megatron_sr1.config.rules import require
from megatron_sr1.config.whole import Config


def check_model(config: Config) -> None:
    """What the model's own config.json says about the layout; no weights are read.

    Raises:
        ConfigError: what `read_hf_config` refuses, or heads, layers or experts that the layout does not divide.
    """
    model, layout = read_hf_config(config.model.hf_dir), config.layout
    heads, layers = ("num_attention_heads", model.num_heads), ("num_hidden_layers", model.num_layers)
    _check_division("layout.tensor", layout.tensor, *heads)
    _check_division("layout.tensor", layout.tensor, "intermediate_size", model.ffn_size)
    _check_division("rollout.engine_tensor", config.rollout.engine_tensor, *heads)
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


def _check_division(key: str, ranks: int, name: str, size: int, otherwise: str = "") -> None:
    require(size % ranks == 0, key, ranks, f"a divisor of the model's {name}={size}", f"Change {key}{otherwise}.")


def check_train_batch(config: Config) -> None:
    """What must divide before a GRPO run starts.

    Raises:
        ConfigError: prompts do not split into mini-batches.
    """
    require(
        config.rollout.prompts_per_step % config.train.batch_size == 0,
        "train.batch_size",
        config.train.batch_size,
        f"a divisor of rollout.prompts_per_step={config.rollout.prompts_per_step}",
        "It is the number of prompts of one optimizer step.",
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
