"""What the policy computes in: the dtype, and FP8 through Transformer Engine.

FP8 recipes (Transformer Engine's names; Megatron-Core's in `_RECIPES`):
    delayed    one scale a tensor, from the largest values of past steps; every layer is FP8
    current    one scale a tensor, from the tensor itself
    blockwise  scales of 1x128 activations and 128x128 weights (DeepSeek-V3, arXiv 2412.19437, 3.3.2); Hopper
    mxfp8      scales of 32 values in a row (Open Compute Project, Microscaling Formats v1.0); Blackwell
Weights stay bf16 and are cast for each product, so checkpoints, weight sync and export never hold FP8 tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version

from megatron_sr1.config import Config, ConfigError, PrecisionConfig
from megatron_sr1.platform.accelerator import Accelerator
from megatron_sr1.platform.runtime import Platform

AMAX_HISTORY = 1024  # steps that delayed scaling looks back, as in Transformer Engine's own default
_NO_LIMIT = (99, 0)


@dataclass(frozen=True)
class _Recipe:
    megatron_name: str
    number_format: str  # hybrid: e4m3 forward, e5m2 gradients; fine scales make e4m3 enough for both
    min_capability: tuple[int, int]
    below_capability: tuple[int, int]
    cards: str  # the same in words
    min_te: str  # Megatron-Core's megatron/core/fp8_utils.py, get_fp8_recipe
    min_toolkit: str  # Transformer Engine's pytorch/quantization.py, _compute_*_support
    bf16_layers: bool  # single layers may stay bf16


_RECIPES = {
    "delayed": _Recipe("delayed", "hybrid", (8, 9), _NO_LIMIT, "Ada (8.9) or newer", "1.11", "12.1", False),
    "current": _Recipe("tensorwise", "hybrid", (8, 9), _NO_LIMIT, "Ada (8.9) or newer", "2.2", "12.1", True),
    # newer cards only imitate it with mxfp8 products
    "blockwise": _Recipe("blockwise", "e4m3", (9, 0), (10, 0), "Hopper (9.0)", "2.3", "12.9", True),
    # from 12.0 on the products of the backward pass are missing
    "mxfp8": _Recipe("mxfp8", "e4m3", (10, 0), (12, 0), "Blackwell (10.x)", "2.1", "12.8", True),
}


def compute_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Of weights and activations outside FP8 matrix products."""
    return torch.float32 if precision.dtype == "fp32" else torch.bfloat16


def shares_prefixes(config: Config, *, on_cpu: bool) -> bool:
    """Whether rows have once what their sequences begin with alike: where that is asked for, and calls of attention can
    be joined by their log-sum-exp. FlashAttention knows no fp32."""
    return config.train.shared_prefix and (on_cpu or config.precision.dtype != "fp32")


def megatron_precision(precision: PrecisionConfig) -> dict[str, Any]:
    """Arguments of Megatron-Core's TransformerConfig."""
    dtype = compute_dtype(precision)
    fields: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    if precision.dtype != "fp8":
        return fields
    recipe = _RECIPES[precision.fp8_recipe]
    fields |= {"fp8": recipe.number_format, "fp8_recipe": recipe.megatron_name, "fp8_param": False}
    if precision.fp8_recipe == "delayed":
        fields |= {"fp8_amax_history_len": AMAX_HISTORY, "fp8_amax_compute_algo": "max"}
    if precision.bf16_first_layers or precision.bf16_last_layers:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": precision.bf16_first_layers,
            "num_layers_at_end_in_bf16": precision.bf16_last_layers,
        }
    return fields


def check_precision(precision: PrecisionConfig, layer_spec: str, platform: Platform) -> None:
    """Whether this machine can compute in `precision`.

    Args:
        layer_spec: model.layer_spec of the configuration, or what it was resolved to.

    Raises:
        ConfigError: FP8 that the machine, its software or the chosen layers do not have.
    """
    if precision.dtype != "fp8":
        return
    card = platform.accelerator
    if card is None:
        raise ConfigError(
            "precision.dtype='fp8' is not allowed: this machine has no GPU. Set precision.dtype to bf16 or fp32."
        )
    if card.te_version is None:
        raise ConfigError(
            "precision.dtype='fp8' is not allowed: it needs Transformer Engine, which is not installed. Install "
            "transformer_engine[pytorch], or set precision.dtype to bf16."
        )
    if layer_spec == "torch":
        raise ConfigError(
            "model.layer_spec='torch' is not allowed with precision.dtype='fp8': only Transformer Engine's layers "
            "compute in FP8. Set model.layer_spec to te or auto, or precision.dtype to bf16."
        )
    _check_recipe(precision, card)


def _check_recipe(precision: PrecisionConfig, card: Accelerator) -> None:
    recipe = _RECIPES[precision.fp8_recipe]
    key = f"precision.fp8_recipe={precision.fp8_recipe!r} is not allowed"
    if not _runs_on(recipe, card):
        fitting = [name for name, other in _RECIPES.items() if _runs_on(other, card)]
        remedy = f"Set it to {' or '.join(fitting)}." if fitting else "Set precision.dtype to bf16."
        capability = ".".join(map(str, card.capability))
        raise ConfigError(f"{key} on {card.name} (compute capability {capability}): it needs {recipe.cards}. {remedy}")
    if Version(card.te_version) < Version(recipe.min_te):
        raise ConfigError(
            f"{key} with Transformer Engine {card.te_version}: it needs {recipe.min_te} or newer. Update "
            "transformer_engine, or choose another recipe."
        )
    if Version(card.toolkit) < Version(recipe.min_toolkit):
        raise ConfigError(
            f"{key} with a torch built for CUDA {card.toolkit}: it needs {recipe.min_toolkit} or newer. Install such a "
            "torch, or choose another recipe."
        )
    if not recipe.bf16_layers and (precision.bf16_first_layers or precision.bf16_last_layers):
        raise ConfigError(
            f"precision.bf16_first_layers={precision.bf16_first_layers} and precision.bf16_last_layers="
            f"{precision.bf16_last_layers} are not allowed with precision.fp8_recipe={precision.fp8_recipe!r}: its "
            "scales are kept for all layers at once. Set both to 0, or choose another recipe."
        )


def _runs_on(recipe: _Recipe, card: Accelerator) -> bool:
    return recipe.min_capability <= card.capability < recipe.below_capability
