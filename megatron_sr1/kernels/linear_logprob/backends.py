"""The back ends of linear_logprob and which of them runs where.

    torch    elementwise torch on tiles (torch_tiles.py): any device, any float dtype
    triton   the same tiles, products by torch, everything else in two Triton kernels (triton_tiles.py): each reads a
             tile of logits once and holds no temporary of its size; float32 and below
    fused    forward in one Triton kernel that multiplies and reduces, so no logits reach memory (triton_forward.py);
             backward as in triton. For passes without a graph and hidden sizes up to about 4096
    auto     on a GPU where Triton is installed and the dtype allows fused for passes without a graph, where it suits H,
             and triton for the others; else torch

Without a GPU the Triton kernels run only in Triton's interpreter, which is for tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from megatron_sr1.kernels.linear_logprob.tiles import Backend
from megatron_sr1.kernels.linear_logprob.torch_tiles import TORCH

_FUSED_MAX_HIDDEN = 4096  # its program holds a row of every operand's tiles: with more it has too few registers
_ROW_BYTES = 16  # the fused kernel reads rows of a multiple of them
BackendName = Literal["auto", "torch", "triton", "fused"]


def select_backend(name: BackendName, hidden: Tensor) -> Backend:
    """The back end for hidden states [T, H] of this device and dtype.

    Raises:
        ValueError: the name is unknown, Triton or a GPU is missing, or the dtype or H does not suit the kernels.
    """
    has_triton = find_spec("triton") is not None
    if name == "auto" and hidden.is_cuda and has_triton:
        name = fastest(hidden.dtype, hidden.shape[1], has_graph=torch.is_grad_enabled())
    if name in ("auto", "torch"):
        return TORCH
    if name not in ("triton", "fused"):
        raise ValueError(f"linear_logprob: backend={name!r} is unknown: use auto, torch, triton or fused.")
    if not has_triton:
        raise ValueError(f"linear_logprob: backend={name!r} needs the package triton; install it, or use torch.")
    if hidden.dtype == torch.float64:
        raise ValueError(f"linear_logprob: backend={name!r} computes in float32; for float64 use torch.")
    return _triton_backend(name, hidden)


def fastest(dtype: torch.dtype, hidden_size: int, *, has_graph: bool) -> BackendName:
    """The back end that `auto` means on a GPU with Triton.

    Args:
        has_graph: whether backward may follow.
    """
    if dtype == torch.float64:
        return "torch"
    whole_rows = hidden_size * dtype.itemsize % _ROW_BYTES == 0
    return "fused" if not has_graph and whole_rows and hidden_size <= _FUSED_MAX_HIDDEN else "triton"


def _triton_backend(name: BackendName, hidden: Tensor) -> Backend:
    import triton

    from megatron_sr1.kernels.linear_logprob.triton_forward import FUSED
    from megatron_sr1.kernels.linear_logprob.triton_tiles import TRITON

    if not hidden.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"linear_logprob: backend={name!r} needs a GPU, but hidden is on {hidden.device}: use auto or torch."
        )
    if name == "triton":
        return TRITON
    if hidden.shape[1] * hidden.element_size() % _ROW_BYTES:
        raise ValueError(
            f"linear_logprob: backend='fused' reads rows of a multiple of 16 bytes, but hidden has H = "
            f"{hidden.shape[1]} of {hidden.dtype}: use triton."
        )
    return FUSED
