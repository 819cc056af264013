"""The weights of a rank's chunks as Megatron-Core's distributed checkpointing saves and loads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_sr1.platform.torch_private import EXTRA_STATE
from megatron_sr1.weights import check_megatron_dir


def sharded_weights(
    chunks: Sequence[torch.nn.Module], *, extra_state: bool = False, by_layer: bool = False
) -> dict[str, Any]:
    """Names in the whole model, shapes and shards of this rank's weights. What one layout saved any other can load.

    Args:
        extra_state: also Transformer Engine's own state, which only its layers save and load: the scales of a delayed
            fp8 recipe.
        by_layer: a tensor of each layer has a name of its own, instead of all layers' being stacked under one: so that
            some of them may be left out.
    """
    metadata = {"non_homogeneous_layers": True} if by_layer else None
    modules: Sequence[Any] = chunks
    states = {f"chunk_{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(modules)}
    if extra_state:
        return states
    return {
        chunk: {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}
        for chunk, state in states.items()
    }


def load_sharded_weights(chunks: Sequence[torch.nn.Module], states: dict[str, Any]) -> None:
    """Takes what was loaded into `sharded_weights`.

    Raises:
        ValueError: the state names other weights than the chunks have.
    """
    for number, chunk in enumerate(chunks):
        report = chunk.load_state_dict(states[f"chunk_{number}"], strict=False)
        missing = [name for name in report.missing_keys if not name.endswith(EXTRA_STATE)]
        if missing or report.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not hold this model: missing {missing[:3]}, unexpected "
                f"{report.unexpected_keys[:3]}. Give the checkpoint of a model with the same config.json."
            )


def load_model_weights(chunks: Sequence[torch.nn.Module], megatron_dir: str) -> None:
    """Fills the chunks from a directory that `megatron-sr1 convert hf-to-megatron` wrote.

    Raises:
        ValueError: the directory is none, or holds another model.
    """
    check_megatron_dir(megatron_dir)
    state = dist_checkpointing.load({"model": sharded_weights(chunks)}, megatron_dir)
    load_sharded_weights(chunks, state["model"])
