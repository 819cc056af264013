"""The forward of Qwen's vision towers over a part of the patches, with the parameters of the transformers module.

Source: transformers 5.19, models/qwen2_5_vl, models/qwen3_vl and models/qwen3_5, the vision models' `forward`. All but
full attention is local to a patch, to a window or to a visual token; full attention gathers keys and values of split
images.

Shape legend: T rows of this rank, U = T / 4 of its visual tokens, A heads of D channels, C channels of a patch, L
DeepStack features (0 but for Qwen3-VL), H channels of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from megatron_sr1.policy.vision.assignment import ImagePiece
from megatron_sr1.policy.vision.exchange import gather_for_all
from megatron_sr1.policy.vision.patches import (
    PatchOrder,
    VisionTower,
    deepstack_layers,
    full_attention_layers,
    has_windows,
    learned_position_taps,
    positions,
)
from megatron_sr1.policy.vision.rows import RankRows
from megatron_sr1.types import EncodedImage


@dataclass(frozen=True)
class TowerInputs:
    """A rank's patches, in the tower's kept order, on its device."""

    pixels: Tensor  # [T, C] float32, normalised there: a byte a value travels
    positions: Tensor  # [T, 2] int64
    taps: tuple[Tensor, Tensor] | None  # [T, 4] indices and weights of learned positions
    rows: RankRows


def tower_inputs(
    tower: VisionTower,
    images: Sequence[EncodedImage],
    orders: Sequence[PatchOrder],
    pieces: Sequence[ImagePiece],
    rows: RankRows,
) -> TowerInputs:
    """Makes the patches of `pieces` (of no other image) and what the tower needs to know of them."""
    config, device = tower.config, tower.device
    num_values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels, places = [torch.zeros(0, num_values, dtype=torch.uint8)], [torch.zeros(0, 2, dtype=torch.int64)]
    indices, weights = [torch.zeros(0, 4, dtype=torch.int64)], [torch.zeros(0, 4)]
    for piece in pieces:
        image = images[piece.image]
        patches = orders[piece.image].patch_rows(piece.start, piece.stop)
        pixels.append(image.patches()[patches])
        places.append(positions(tower, image.grid_thw)[patches])
        if not has_windows(tower):
            index, weight = learned_position_taps(tower, image.grid_thw)
            indices.append(index[patches])
            weights.append(weight[patches])
    windows = rows.windows
    if windows is not None:
        windows = replace(windows, kept=windows.kept.to(device), pieces=windows.pieces.to(device))
        rows = replace(rows, windows=windows)

    def place(parts: list[Tensor]) -> Tensor:
        together = torch.cat(parts)
        together = together if device.type == "cpu" else together.pin_memory().to(device, non_blocking=True)
        return together if windows is None else together[windows.kept]

    taps = None if has_windows(tower) else (place(indices), place(weights))
    values = images[0].normalisation.applied(place(pixels))
    return TowerInputs(values, place(places), taps, rows)


def run_tower(tower: VisionTower, inputs: TowerInputs, group: ProcessGroup, *, recompute: bool) -> Tensor:
    """[U, 1 + L, H]: the visual tokens and their DeepStack features, in piece order. Every rank of `group` calls it.

    Args:
        tower: whose submodules run.
        inputs: of this rank, possibly no patch.
        group: the ranks that hold pieces of shared images.
        recompute: keep only the inputs of the blocks, and run them again in backward.
    """
    hidden = tower.patch_embed(inputs.pixels)
    if inputs.taps is not None:
        indices, weights = inputs.taps
        learned = (tower.pos_embed(indices) * weights[:, :, None]).sum(1)
        hidden = hidden + learned.to(hidden.dtype)
    rotary = tower.rotary_pos_emb(hidden, inputs.positions)  # cos, sin: [T, D]
    full, levels = full_attention_layers(tower), deepstack_layers(tower)
    features = []
    for layer, block in enumerate(tower.blocks):
        attend = partial(_attend_fully, rows=inputs.rows, group=group) if layer in full else None
        attend = attend or partial(_attend_in_windows, rows=inputs.rows)
        run = partial(_run_block, block, rotary=rotary, attend=attend)
        if recompute and torch.is_grad_enabled():
            # the linear layers behind attention keep their inputs, so every rank runs the block again past its exchange
            hidden = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = run(hidden)
        if layer in levels:
            features.append(tower.deepstack_merger_list[len(features)](hidden))
    tokens = torch.stack([tower.merger(hidden), *features], dim=1)
    windows = inputs.rows.windows
    if windows is None:
        return tokens
    per_token = tower.spatial_merge_size**2
    return tokens[windows.pieces[::per_token] // per_token]


def _run_block(block: nn.Module, hidden: Tensor, *, rotary: tuple[Tensor, Tensor], attend: partial[Tensor]) -> Tensor:
    attention = block.attn
    heads = attention.qkv(block.norm1(hidden)).unflatten(1, (3, attention.num_heads, attention.head_dim))
    query, key, value = heads.unbind(1)  # [T, A, D]
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    hidden = hidden + attention.proj(attend(query, key, value).flatten(1))
    return hidden + block.mlp(block.norm2(hidden))


def _attend_in_windows(query: Tensor, key: Tensor, value: Tensor, *, rows: RankRows) -> Tensor:
    """[T, A, D], in kept order."""
    sizes = [count * length for count, length in rows.windows.groups]
    outputs = [query[:0]]
    for (count, length), *parts in zip(
        rows.windows.groups, *(x.split(sizes) for x in (query, key, value)), strict=True
    ):
        windows = [part.unflatten(0, (count, length)).transpose(1, 2) for part in parts]  # [count, A, length, D]
        outputs.append(scaled_dot_product_attention(*windows).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _attend_fully(query: Tensor, key: Tensor, value: Tensor, *, rows: RankRows, group: ProcessGroup) -> Tensor:
    """[T, A, D], in kept order."""
    if rows.windows is not None:
        query, key, value = (tensor[rows.windows.pieces] for tensor in (query, key, value))
    pair = torch.stack([key, value], dim=1)  # [T, 2, A, D]
    outputs, shared = [query[:0]], pair
    if rows.shared_sizes:
        shared = gather_for_all(pair[: rows.shared_sizes[group.rank()]], rows.shared_sizes, group)
        outputs.append(shared[:0, 0])  # a rank without a piece takes part in the gather's backward too
    for segment in rows.segments:
        keys = (shared if segment.shared else pair)[segment.key_start : segment.key_stop]
        parts = (query[segment.start : segment.stop], keys[:, 0], keys[:, 1])
        attended = scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in parts))  # [1, A, rows, D]
        outputs.append(attended[0].transpose(0, 1))
    output = torch.cat(outputs)
    return output if rows.windows is None else output[rows.windows.kept]
