"""The order in which a tower keeps an image's patches, where that order may be cut, and what each patch's place means.

Shape legend: P patches of an image; U = P / 4 units of 2 x 2 patches, each of which becomes one visual token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

VisionTower: TypeAlias = (
    Qwen2_5_VisionTransformerPretrainedModel
    | Qwen3VLVisionModel
    | Qwen3VLMoeVisionModel
    | Qwen3_5VisionModel
    | Qwen3_5MoeVisionModel
)
Grid: TypeAlias = tuple[int, int, int]  # patches along time, height, width


@dataclass(frozen=True)
class PatchOrder:
    """How a tower keeps one image."""

    units: Tensor  # [U] int64: the n-th unit of the tower is unit units[n] of the processor
    cuts: Sequence[int]  # ascending, 0 ... P: between windows where the tower has them, else between units

    def patch_rows(self, start: int, stop: int) -> Tensor:
        """[stop - start] int64: rows of the processor's patches that are the tower's [start, stop)."""
        num_patches, num_units = self.cuts[-1], len(self.units)
        per_unit = num_patches // num_units
        rows = self.units[start // per_unit : stop // per_unit, None] * per_unit + torch.arange(per_unit)
        return rows.flatten()


def new_tower(config: Any, **options: Any) -> VisionTower:
    """The tower of a model's `vision_config`, with random weights. `options`: those of `AutoModel.from_config`."""
    return AutoModel.from_config(config, **options)


def has_windows(tower: VisionTower) -> bool:
    """Whether most layers attend within windows only."""
    return isinstance(tower, Qwen2_5_VisionTransformerPretrainedModel)


def full_attention_layers(tower: VisionTower) -> frozenset[int]:
    """The layers that attend over whole images."""
    if isinstance(tower, Qwen2_5_VisionTransformerPretrainedModel):
        return frozenset(tower.fullatt_block_indexes)
    return frozenset(range(len(tower.blocks)))


def deepstack_layers(tower: VisionTower) -> Sequence[int]:
    """The layers whose features the first language layers add, in the order of its mergers."""
    if isinstance(tower, Qwen3VLVisionModel | Qwen3VLMoeVisionModel):
        return tower.deepstack_visual_indexes
    return ()


def patch_order(tower: VisionTower, grid: Grid) -> PatchOrder:
    """The order of an image of `grid` patches."""
    if isinstance(tower, Qwen2_5_VisionTransformerPretrainedModel):
        return _window_order(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return _plain_order(grid, tower.spatial_merge_size)


@lru_cache(maxsize=1024)  # runs see few sizes, each of them often
def _window_order(grid: Grid, merge_size: int, window_size: int, patch_size: int) -> PatchOrder:
    units, cuts = get_vision_window_index(_one(grid), merge_size, window_size, patch_size)
    return PatchOrder(units, tuple(cuts.tolist()))


@lru_cache(maxsize=1024)
def _plain_order(grid: Grid, merge_size: int) -> PatchOrder:
    num_patches = grid[1] * grid[2]
    return PatchOrder(torch.arange(num_patches // merge_size**2), range(0, num_patches + merge_size**2, merge_size**2))


def positions(tower: VisionTower, grid: Grid) -> Tensor:
    """[P, 2] int64: row and column of each patch, in the processor's order."""
    return get_vision_position_ids(_one(grid), tower.spatial_merge_size)


def learned_position_taps(tower: VisionTower, grid: Grid) -> tuple[Tensor, Tensor]:
    """Qwen3-VL adds learned positions, a square table resampled to the grid: indices [P, 4] int64 into the table and
    their weights [P, 4], in the processor's order."""
    return get_vision_interpolation_indices_and_weights(
        _one(grid),
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.spatial_merge_size,
    )


def _one(grid: Grid) -> Tensor:
    assert grid[0] == 1, f"an image has one frame, not {grid[0]}"
    return torch.tensor([grid])
