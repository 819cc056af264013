"""Which layers the language model is made of: Transformer Engine's, or plain torch modules.

Both give checkpoints with the same names and shapes, so that what one saved the other loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sr1.config import ConfigError, LinearAttention
from megatron_sr1.platform.runtime import Platform
from megatron_sr1.policy.layers.te_layers import te_block_spec
from megatron_sr1.policy.layers.torch_layers import torch_block_spec

LayerSpecName = Literal["te", "torch"]


def layer_spec_name(choice: str, platform: Platform, dtype: str) -> LayerSpecName:
    """`choice` is model.layer_spec, `dtype` precision.dtype. "auto" takes Transformer Engine on a GPU that has it
    installed; not for fp32, where its attention falls back to one that keeps all scores.

    Raises:
        ConfigError: Transformer Engine is asked for where there is none.
    """
    card = platform.accelerator
    available = card is not None and card.te_version is not None
    if choice == "te" and not available:
        lack = "this machine has no GPU" if card is None else "Transformer Engine is not installed"
        raise ConfigError(f"model.layer_spec='te' is not allowed: {lack}. Set model.layer_spec to auto or torch.")
    if choice == "auto":
        return "te" if available and dtype != "fp32" else "torch"
    assert choice in ("te", "torch"), choice
    return choice


def block_spec(
    name: LayerSpecName,
    config: TransformerConfig,
    num_layers: int,
    vp_stage: int | None,
    linear: Sequence[LinearAttention | None],
) -> TransformerBlockSubmodules:
    """`num_layers` layers of one chunk and the final norm. They are new, so that their parts may be replaced.

    Args:
        vp_stage: which chunk of this rank, None where it has only one.
        linear: of each layer of the model, the sizes of the gated delta rule that it has in place of attention.
    """
    if name == "te":
        return te_block_spec(config, num_layers, vp_stage, linear)
    return torch_block_spec(config, num_layers, vp_stage, linear)
