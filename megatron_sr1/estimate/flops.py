"""Floating-point operations of a forward pass, by part of the model: a multiplication and an addition count as two.

Products of matrices alone, as in Narayanan et al. 2021 (Efficient Large-Scale Language Model Training on GPU Clusters
Using Megatron-LM, arXiv 2104.04473, appendix): norms, rotations, activations and softmax are a percent. A backward pass
takes twice as many.

    n tokens of a sequence    H hidden    h, g heads and key/value heads of d channels    F feed-forward width
    layer, a token:  2 H d (2 h + 2 g) + 6 H F; of a mixture 2 H E for the router, 6 H F_e for each chosen
                     expert, and 6 H F_s + 2 H for the shared one and its gate
    attention:       4 n^2 h d, half of it where the causal half alone is computed
    gated delta rule, in place of attention, g key heads of dk and h value heads of dv channels, a token:
                     2 H (2 g dk + 2 h dv + 2 h) + 2 h dv H, the convolution's 2 (2 g dk + h dv) for each tap, and
                     h (6 dk dv + 2 C (2 dk + dv)) in chunks of C = 64 tokens, of which sequences are taken to be
                     whole numbers; the triangular systems are not counted
    head:            2 H V for each scored token
    tower, a patch:  2 C values of a patch; in each block 8 C^2, 6 C F with a gate, else 4 C F, and 4 C for each patch
                     of its window or image
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sr1.config import LinearAttention
from megatron_sr1.estimate.vision import has_windows, patch_values, tower_sizes
from megatron_sr1.kernels.delta_rule import CHUNK
from megatron_sr1.policy.architecture import Architecture


@dataclass(frozen=True)
class Flops:
    """Of forward passes."""

    language: float = 0.0  # decoder layers
    head: float = 0.0
    vision: float = 0.0  # the tower and its mergers

    @property
    def total(self) -> float:
        return self.language + self.head + self.vision

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.language + other.language, self.head + other.head, self.vision + other.vision)

    def times(self, factor: float) -> Flops:
        """So many of these."""
        return Flops(factor * self.language, factor * self.head, factor * self.vision)


def sequence_flops(model: Architecture, num_tokens: float, num_scored: float, *, causal: bool = True) -> Flops:
    """Of one sequence of text and visual tokens, whose last `num_scored` have their probabilities computed.

    Args:
        causal: attention computes half of its scores, as kernels for it do.
    """
    hidden, wide = model.hidden_size, model.num_heads * model.head_dim
    gates = 2 * hidden * wide if model.family.output_gate else 0
    projections = 4 * hidden * (wide + model.num_kv_heads * model.head_dim) + gates
    recurrent = _delta_flops(model.linear, hidden) if model.linear is not None else 0
    dense = 6 * hidden * model.ffn_size
    mixture = 2 * hidden * model.num_experts + model.experts_per_token * 6 * hidden * model.expert_ffn_size
    mixture += 6 * hidden * model.shared_expert_size + (2 * hidden if model.shared_expert_size else 0)
    per_token = sum(
        (recurrent if is_linear else projections) + (mixture if is_moe else dense)
        for is_linear, is_moe in zip(model.linear_layers, model.moe_layers, strict=True)
    )
    attention = attention_flops(model, num_tokens**2 * (0.5 if causal else 1.0))
    return Flops(num_tokens * per_token + attention, 2.0 * hidden * model.vocab_size * num_scored)


def _delta_flops(linear: LinearAttention, hidden: int) -> float:
    """Of one token in one layer."""
    heads, key, value = linear.num_value_heads, linear.key_dim, linear.value_dim
    products = 2 * hidden * (linear.num_key_heads * linear.rows_per_key + heads * value)
    convolution = 2 * linear.taps * linear.num_key_heads * linear.channels_per_key
    return products + convolution + heads * (6 * key * value + 2 * CHUNK * (2 * key + value))


def attention_flops(model: Architecture, scores: float) -> float:
    """Of all layers, for so many pairs of a token and one that it attends to."""
    return 4.0 * model.num_attention_layers * model.num_heads * model.head_dim * scores


def patch_flops(model: Architecture, grid: tuple[int, int, int]) -> float:
    """Of the tower's first product, from pixels to channels."""
    tower = tower_sizes(model)
    return 2.0 * grid[0] * grid[1] * grid[2] * tower["hidden_size"] * patch_values(tower)


def image_flops(model: Architecture, grid: tuple[int, int, int]) -> Flops:
    """Of the tower for one image.

    Args:
        grid: patches along time, height and width.
    """
    tower = tower_sizes(model)
    frames, height, width = grid
    patches, channels = frames * height * width, tower["hidden_size"]
    inner = (6 if has_windows(tower) else 4) * channels * tower["intermediate_size"]
    states = patches * (2 * channels * patch_values(tower) + tower["depth"] * (8 * channels**2 + inner))
    over_images = 4 * channels * frames * (height * width) ** 2
    num_whole = len(tower["fullatt_block_indexes"]) if has_windows(tower) else tower["depth"]
    in_windows = 4 * channels * frames * _window_squares(tower, height, width) if has_windows(tower) else 0
    attention = num_whole * over_images + (tower["depth"] - num_whole) * in_windows
    merged = tower["spatial_merge_size"] ** 2
    merger = patches / merged * 2 * (merged * channels) * (merged * channels + model.hidden_size)
    return Flops(vision=states + attention + (1 + len(model.deepstack_layers)) * merger)


def _window_squares(tower: Mapping[str, Any], height: int, width: int) -> int:
    """The sum of squares of the windows' patches; those at the right and lower edge may be smaller."""
    side = tower["window_size"] // tower["patch_size"]

    def parts(length: int) -> Iterable[int]:
        return (min(side, length - start) for start in range(0, length, side))

    return sum((rows * columns) ** 2 for rows in parts(height) for columns in parts(width))
