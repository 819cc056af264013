"""Activations of the vision tower for one packed row, on a rank of the first pipeline stage.

The tensor and context ranks of a replica share the patches of a row (policy/vision). A row is taken to be full of
visual tokens of different images, which no row can exceed: 4 patches a token.

    P patches of a rank, of r    C channels of the tower    F width of its feed-forward part    e bytes of an element
    block, a patch:  norms 2 n    attention 7 e C in windows, (3 + 2 r) e C over images    sums of scores 4 heads
                     feed-forward: gate, up, activation, product 4 e F; without a gate 2 e F
    n: RMSNorm of transformers computes in fp32 and keeps 4 C + 2 e C, LayerNorm 2 e C
    attention: queries, result and a copy of it; keys and values, of all ranks where images are split among them; in
    windows the rank's own, and the three before they are turned
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sr1.config import Config
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.parameter_counts import StageCount


@dataclass(frozen=True)
class VisionBytes:
    """Of one packed row, on one rank."""

    kept: float  # until the row's backward
    working: float  # while the row is encoded, or its backward runs


def vision_bytes(
    model: Architecture, config: Config, count: StageCount, row_tokens: int, *, element: int
) -> VisionBytes:
    """The tower's share of a row's activations. A tower that is frozen with its mergers keeps none, but its results for
    the whole step; before mergers that are trained it keeps their inputs."""
    tower, layout = tower_sizes(model), config.layout
    per_token, ranks = tower["spatial_merge_size"] ** 2, layout.tensor * layout.context
    patches = row_tokens * per_token / ranks
    results = row_tokens * (1 + len(model.deepstack_layers)) * model.hidden_size * element
    over_images = block_bytes(tower, element, attention=3 + 2 * ranks)
    in_windows = block_bytes(tower, element, attention=7)
    num_windowed = tower["depth"] - len(tower["fullatt_block_indexes"]) if has_windows(tower) else 0
    block = patches * max(over_images, in_windows if num_windowed else 0.0)
    whole = patches * (num_windowed * in_windows + (tower["depth"] - num_windowed) * over_images)
    if not count.trained_tower and not count.trained_mergers:
        return VisionBytes(kept=results, working=block + results)
    embedding = patches * element * patch_values(tower)  # the patches themselves, for the gradient of their embedding
    merger = patches * merger_bytes(model, tower, element)
    if not count.trained_tower:
        return VisionBytes(kept=merger, working=block + 3 * results)
    blocks = tower["depth"] * patches * element * tower["hidden_size"] if config.recompute.vision else whole
    again = block if config.recompute.vision else 0.0
    # encoding ends in each rank's part of the visual tokens, gathered, put in order, and written into the row
    return VisionBytes(kept=embedding + blocks + merger, working=again + 3 * results)


def tower_sizes(model: Architecture) -> Mapping[str, Any]:
    """The numbers of `vision_config`, by one set of names: all estimates of the tower read them here. `hidden_size` is
    the width of a patch, `intermediate_size` that of its feed-forward part."""
    return model.hf.vision_config.to_dict()


def block_bytes(tower: Mapping[str, Any], element: int, *, attention: int) -> float:
    """Of one patch in one block, whose attention keeps so many numbers a channel."""
    states = attention * element * tower["hidden_size"] + 4 * tower["num_heads"]
    inner = (4 if has_windows(tower) else 2) * element * tower["intermediate_size"]
    return 2 * _norm_bytes(tower, element) + states + inner


def patch_values(tower: Mapping[str, Any]) -> int:
    """Numbers in one patch."""
    colours = tower.get("in_channels") or tower["in_chans"]
    return colours * tower["temporal_patch_size"] * tower["patch_size"] ** 2


def merger_bytes(model: Architecture, tower: Mapping[str, Any], element: int) -> float:
    """Of one patch, in the merger and in those of the DeepStack features: norm, linear layer, activation, linear
    layer; the first is as wide as the patches of a visual token together."""
    return (1 + len(model.deepstack_layers)) * (_norm_bytes(tower, element) + 2 * element * tower["hidden_size"])


def has_windows(tower: Mapping[str, Any]) -> bool:
    """Whether blocks look at windows. Towers with windows, Qwen2.5-VL's, have a gate and RMSNorm too."""
    return "window_size" in tower


def _norm_bytes(tower: Mapping[str, Any], element: int) -> float:
    fixed = 4 if has_windows(tower) else 0
    return (fixed + 2 * element) * tower["hidden_size"]
