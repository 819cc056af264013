"""Multimodal rotary embedding: the angles of each token (Qwen2-VL, arXiv 2409.12191, section 2.1).

Shapes: T tokens, d channels of a head that are turned (all, or the first ones), positions [3, T] = time, height, width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sr1.platform.torch_private import FixedDtypeBuffers


class MultimodalRotary(FixedDtypeBuffers):
    """Angle of frequency i of token t: position[axis(i), t] / theta^(2i / d), for i < d / 2; the second half of the d
    channels repeats the first.

    axis(i) is time, height or width: in three sections of the frequencies (Qwen2.5-VL), or by turns, T H W T H W ...,
    until the sections of height and width are used up, and time for the rest (Qwen3-VL).

    The frequencies stay fp32 in a model that is cast to bf16: 8 bits do not hold a position.
    """

    axes: Tensor
    frequencies: Tensor

    def __init__(self, rotary_dim: int, theta: float, section: tuple[int, int, int], *, interleaved: bool) -> None:
        """Args: section: how many frequencies time, height and width have; together d / 2."""
        super().__init__()
        assert 2 * sum(section) == rotary_dim
        frequencies = 1.0 / (theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim))
        axes = _interleaved(section) if interleaved else _sectioned(section)
        # [d / 2]: which of the three positions turns each frequency
        self.register_buffer("axes", axes, persistent=False)
        self.register_buffer("frequencies", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> Tensor:
        """[3, T] -> angles [T, 1, 1, d], radians, fp32, for Megatron-Core's `apply_rotary_pos_emb` (halves)."""
        positions = position_ids[self.axes].float()  # [d / 2, T]
        angles = positions.T * self.frequencies
        return torch.cat([angles, angles], dim=-1)[:, None, None]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, 1, h, d] by the angles with `cos` and `sin` [T, 1, 1, d], in its dtype, whose halves are alike: Megatron-
    Core's unfused `apply_rotary_pos_emb` in a third of its passes, its gradient included."""
    made: Any = _Turned.apply(x, cos, sin)
    return made


class _Turned(torch.autograd.Function):
    """(a, b) -> (a cos - b sin, b cos + a sin) of the halves a, b of a head; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    out = x * cos
    (a, b), (out_a, out_b), half_sin = x.chunk(2, -1), out.chunk(2, -1), sin.chunk(2, -1)[0]
    out_a.addcmul_(b, half_sin, value=-way)
    out_b.addcmul_(a, half_sin, value=way)
    return out


def _sectioned(section: tuple[int, int, int]) -> Tensor:
    return torch.tensor([axis for axis in range(3) for _ in range(section[axis])])


def _interleaved(section: tuple[int, int, int]) -> Tensor:
    """As transformers' Qwen3VLTextRotaryEmbedding.recomposition_frequencies: slices of step 3 over the time axis."""
    axes = torch.zeros(sum(section), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes
