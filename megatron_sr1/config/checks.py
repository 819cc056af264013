"""What a configuration must agree on with the model's own, and what must hold before a GRPO run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sr1.config.rules import require
from megatron_sr1.config.whole import Config


def check_model(config: Config) -> None:
    """What the model's own config.json says about the layout; no weights are read.

    Raises:
        ConfigError: no config.json in model.hf_dir, or heads, layers or experts that the layout does not divide.
    """
    path = Path(config.model.hf_dir) / "config.json"
    require(
        path.is_file(),
        "model.hf_dir",
        config.model.hf_dir,
        "a model directory in Hugging Face format, which holds a config.json",
        "Give the path of one; `make quickstart` makes a tiny one.",
    )
    tree = json.loads(path.read_text(encoding="utf-8"))
    text = tree.get("text_config", tree)  # older checkpoints keep the language model's keys at the top
    layout = config.layout
    _check_division("layout.tensor", layout.tensor, text, "num_attention_heads")
    _check_division("layout.tensor", layout.tensor, text, "intermediate_size")
    _check_division("rollout.engine_tensor", config.rollout.engine_tensor, text, "num_attention_heads")
    key_value_heads = text["num_key_value_heads"]
    require(
        key_value_heads % layout.tensor == 0 or layout.tensor % key_value_heads == 0,
        "layout.tensor",
        layout.tensor,
        f"a divisor or a multiple of the model's num_key_value_heads={key_value_heads}",
        "Ranks share key/value heads evenly.",
    )
    layers = text["num_hidden_layers"]
    if layout.stage_layers:
        require(
            sum(layout.stage_layers) == layers,
            "layout.stage_layers",
            layout.stage_layers,
            f"{layout.num_chunks} numbers that add up to the model's num_hidden_layers={layers}",
            "Change them, or leave the key out for equal chunks.",
        )
    else:
        name, chunks = ("layout.pipeline * layout.virtual", layout.num_chunks)
        _check_division(name, chunks, text, "num_hidden_layers", " or set layout.stage_layers")
    experts = next((name for name in ("num_experts", "num_local_experts") if text.get(name)), None)  # old and new name
    if experts is not None:
        _check_division("layout.expert", layout.expert, text, experts)
        require(
            layout.tensor == 1 or layout.sequence_parallel,
            "layout.sequence_parallel",
            layout.sequence_parallel,
            "true for a mixture of experts with layout.tensor above 1",
            "Without it every tensor-parallel rank would send every token to the experts.",
        )
    else:
        require(layout.expert == 1, "layout.expert", layout.expert, "1: the model has no experts", "Leave it out.")


def _check_division(key: str, ranks: int, text: dict[str, Any], name: str, otherwise: str = "") -> None:
    allowed = f"a divisor of the model's {name}={text[name]}"
    require(text[name] % ranks == 0, key, ranks, allowed, f"Change {key}{otherwise}.")


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
