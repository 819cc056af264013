"""The norm and the turning of heads that a CPU computes, against torch's and Megatron-Core's, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_sr1.platform.norm import rms_norm
from megatron_sr1.policy.layers.rotary import turned


def relative_error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("shape", [(7, 1, 16), (5, 1, 3, 8)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])  # of the hidden states; eps counts beside the first
def test_the_norm_is_torchs(shape: tuple[int, ...], size: float) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64) * size, torch.randn(shape[-1], dtype=torch.float64)]
    exact = [tensor.requires_grad_() for tensor in exact]
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    grad = torch.randn(shape, dtype=torch.float64)
    wanted = F.rms_norm(exact[0], exact[1].shape, exact[1], 1e-6)
    found = rms_norm(*ours, 1e-6)
    assert relative_error(found, wanted) < 1e-6
    pairs = zip(torch.autograd.grad(found, ours, grad.float()), torch.autograd.grad(wanted, exact, grad), strict=True)
    for its, right in pairs:
        assert relative_error(its, right) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_turned_as_megatron_turns_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    half = 20.0 * torch.randn(9, 1, 1, 4)
    angles = torch.cat([half, half], -1)
    exact = torch.randn(9, 1, 3, 8, dtype=torch.float64, requires_grad=True)
    ours = exact.detach().to(dtype).requires_grad_()
    grad = torch.randn(9, 1, 3, 8, dtype=torch.float64)
    wanted = _apply_rotary_pos_emb_bshd(exact, angles.double())
    found = turned(ours, angles.cos().to(dtype), angles.sin().to(dtype))
    most = 1e-6 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype and relative_error(found, wanted) < most
    (its,), (right,) = torch.autograd.grad(found, ours, grad.to(dtype)), torch.autograd.grad(wanted, exact, grad)
    assert relative_error(its, right) < most
