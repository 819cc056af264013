"""A causal convolution of each channel over the tokens of its own sequence, in plain torch.

Shapes: T tokens of a packed row, C channels, K taps, the last of which is the token itself.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_sr1.kernels.delta_rule.plan import RowPlan


def convolved(x: Tensor, weight: Tensor, plan: RowPlan) -> Tensor:
    """[T, C]: of x [T, C] with weight [C, K], 0 before the start of a sequence; both fp32."""
    taps = weight.shape[1]
    out = x * weight[:, -1]
    for distance in range(1, taps):
        tap = weight[:, taps - 1 - distance]
        before = F.pad(x, (0, 0, distance, 0))[: len(x)]
        out = out + before * (plan.places >= distance)[:, None] * tap
        rows, sources = plan.bridges[distance - 1]
        if len(rows):
            out = out.index_add(0, rows, x.index_select(0, sources) * tap)
    return out
