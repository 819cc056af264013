"""The back ends of linear_logprob and which of them runs where.

    torch    elementwise torch on tiles (torch_tiles.py): any device, any float dtype
    triton   the same tiles, products by torch, everything else in two Triton kernels (triton_tiles.py): each reads a
             tile of logits once and holds no temporary of its size; float32 and below
    fused    forward in one Triton kernel that multiplies and reduces, so no logits reach memory (triton_forward.py);
             backward as in triton. For passes without a graph and hidden sizes up to about 4096
    auto     triton on a GPU where Triton is installed and the dtype allows, else torch

Without a GPU the Triton kernels run only in Triton's interpreter, which is for tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from megatron_sr1.kernels.linear_logprob.tiles import Backend
from megatron_sr1.kernels.linear_logprob.torch_tiles import TORCH

BackendName = Literal["auto", "torch", "triton", "fused"]


def select_backend(name: BackendName, hidden: Tensor) -> Backend:
    """The back end for hidden states [T, H] of this device and dtype.

    Raises:
        ValueError: the name is unknown, Triton or a GPU is missing, or the dtype or H does not suit the kernels.
    """
    has_triton = find_spec("triton") is not None
    if name == "auto":
        name = "triton" if hidden.is_cuda and has_triton and hidden.dtype != torch.float64 else "torch"
    if name == "torch":
        return TORCH
    if name not in ("triton", "fused"):
        raise ValueError(f"linear_logprob: backend={name!r} is unknown: use auto, torch, triton or fused.")
    if not has_triton:
        raise ValueError(f"linear_logprob: backend={name!r} needs the package triton; install it, or use torch.")
    if hidden.dtype == torch.float64:
        raise ValueError(f"linear_logprob: backend={name!r} computes in float32; for float64 use torch.")
    return _triton_backend(name, hidden)


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
    if hidden.shape[1] * hidden.element_size() % 16:
        raise ValueError(
            f"linear_logprob: backend='fused' reads rows of a multiple of 16 bytes, but hidden has H = "
            f"{hidden.shape[1]} of {hidden.dtype}: use triton."
        )
    return FUSED
