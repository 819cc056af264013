"""The Triton back end of linear_logprob: products of a tile by torch, one row kernel to fold it, one to differentiate.

One program owns one row of the tile and walks over its columns, so every sum has a fixed order and nothing is atomic.
A row's number is widened to 64 bits before it is multiplied: T*V passes 2**31 at T = 16384.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sr1.kernels.linear_logprob.tiles import Backend, RowGradients, Tile, raw_product

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK_COLUMNS = 4096  # 16 elements a thread; at 65536 the registers spill
NUM_WARPS = 8


class TritonTiles:
    """A tile is the product [R, C], without bias and temperature: the kernels apply them as they read."""

    def make(self, hidden: Tensor, weight: Tensor, tile: Tile) -> Tensor:
        return raw_product(hidden, weight, tile.rounded)

    def fold(self, state: Tensor, z: Tensor, tile: Tile, entropy: bool) -> None:
        _fold_rows[(len(z),)](
            z,
            state,
            tile.targets,
            *_optional(tile, z),
            z.stride(0),
            state.stride(0),
            z.shape[1],
            _temperature_stride(tile),
            HAS_TEMPERATURE=tile.inverse_temperature is not None,
            HAS_BIAS=tile.bias is not None,
            ENTROPY=entropy,
            **_launch(z.shape[1]),
        )

    def gradient(
        self, z: Tensor, logsumexp: Tensor, tile: Tile, gradients: RowGradients, dtype: torch.dtype, overwrite: bool
    ) -> Tensor:
        """See TileOperations."""
        grad_z = z if overwrite and z.dtype == dtype else torch.empty_like(z, dtype=dtype)
        _differentiate_rows[(len(z),)](
            z,
            grad_z,
            logsumexp,
            tile.targets,
            *_optional(tile, z),
            gradients.at_target,
            gradients.of_p,
            gradients.of_p if gradients.of_p_log_p is None else gradients.of_p_log_p,
            z.stride(0),
            grad_z.stride(0),
            z.shape[1],
            _temperature_stride(tile),
            HAS_TEMPERATURE=tile.inverse_temperature is not None,
            HAS_BIAS=tile.bias is not None,
            ENTROPY=gradients.of_p_log_p is not None,
            **_launch(z.shape[1]),
        )
        return grad_z


TRITON = Backend(TritonTiles())


def _optional(tile: Tile, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse temperature and bias; where there is none a pointer that the kernel does not follow."""
    temperature = stand_in if tile.inverse_temperature is None else tile.inverse_temperature
    return temperature, stand_in if tile.bias is None else tile.bias


def _temperature_stride(tile: Tile) -> int:
    return 0 if tile.inverse_temperature is None else tile.inverse_temperature.stride(0)


def _launch(columns: int) -> dict[str, int | bool]:
    """Block size and warps. Fused multiply-adds are off: z and z - max(z) must see the same rounding of z, or
    the largest exponential is not exactly 1 and a log-prob can come out above 0."""
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": NUM_WARPS if block == BLOCK_COLUMNS else 4, "enable_fp_fusion": False}


@triton.jit
def _load_logits(
    product, bias, column, inside, scale, HAS_TEMPERATURE: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """z of one block of a row, in float32 before any arithmetic."""
    z = tl.load(product + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=inside, other=0.0)
    if HAS_TEMPERATURE:
        z *= scale
    return z


@triton.jit
def _fold_rows(
    product, state, targets, inverse_temperature, bias,
    product_stride, state_stride, columns, temperature_stride,
    HAS_TEMPERATURE: tl.constexpr, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Folds row program_id(0) of the tile into its column of the state [4, R]."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    target = tl.load(targets + row)
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature + row * temperature_stride)
    state += row
    top = tl.load(state)
    total = tl.load(state + state_stride)
    z_target = tl.load(state + 2 * state_stride)
    weighted = tl.load(state + 3 * state_stride)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = _load_logits(product, bias, column, inside, scale, HAS_TEMPERATURE, HAS_BIAS)
        z = tl.where(inside, z, float("-inf"))
        z_target = tl.maximum(z_target, tl.max(tl.where(column == target, z, float("-inf")), 0))
        new_top = tl.maximum(top, tl.max(z, 0))
        drop = top - new_top
        decay = tl.exp2(drop * LOG2_E)
        shifted = z - new_top
        exponentials = tl.exp2(shifted * LOG2_E)
        if ENTROPY:
            weighted = decay * (weighted + drop * total) + tl.sum(exponentials * tl.where(inside, shifted, 0.0), 0)
        total = total * decay + tl.sum(exponentials, 0)
        top = new_top
    tl.store(state, top)
    tl.store(state + state_stride, total)
    tl.store(state + 2 * state_stride, z_target)
    if ENTROPY:
        tl.store(state + 3 * state_stride, weighted)


@triton.jit
def _differentiate_rows(
    product, gradient, logsumexp, targets, inverse_temperature, bias, at_target, of_p, of_p_log_p,
    product_stride, gradient_stride, columns, temperature_stride,
    HAS_TEMPERATURE: tl.constexpr, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes d_logits of row program_id(0); the gradient may lie where the product lies."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    gradient += row * gradient_stride
    target = tl.load(targets + row)
    scale = 1.0
    if HAS_TEMPERATURE:
        scale = tl.load(inverse_temperature + row * temperature_stride)
    total = tl.load(logsumexp + row)
    to_target = tl.load(at_target + row)
    to_p = tl.load(of_p + row)
    to_p_log_p = tl.load(of_p_log_p + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        log_p = _load_logits(product, bias, column, inside, scale, HAS_TEMPERATURE, HAS_BIAS) - total
        coefficient = to_p
        if ENTROPY:
            coefficient = log_p * to_p_log_p + to_p
        grad_z = tl.where(column == target, to_target, 0.0) - coefficient * tl.exp2(log_p * LOG2_E)
        tl.store(gradient + column, grad_z.to(gradient.dtype.element_ty), mask=inside)
