"""Root mean square norm, by the kernel of the device. On a CPU torch has none: it would make a dozen passes over the
hidden states, forward and backward, of which half are enough.

With r = 1 / sqrt(mean(x^2) + eps) and g the gradient of y = x r w,

    dw = sum over tokens of g x r        dx = r (g w - x r mean(g w x r))

Shapes: H channels; [...] any, tokens or heads of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H], weight [H] -> [..., H], all fp32."""
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    normed: Any = _RmsNorm.apply(x, weight, eps)
    return normed


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # [..., 1]
        scale = root.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = grad * normed
        weight_grad = product.flatten(0, -2).sum(0)
        mean = (product @ weight).div_(len(weight)).unsqueeze(-1)  # [..., 1]
        grad = torch.mul(grad, weight, out=product).sub_(normed.mul_(mean)).mul_(scale)
        return grad, weight_grad, None
