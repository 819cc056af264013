"""The gated delta rule and the convolution before it, over packed rows whose sequences may share prefixes."""

from megatron_sr1.kernels.delta_rule.backends import causal_convolution, gated_delta_rule
from megatron_sr1.kernels.delta_rule.chunked import CHUNK
from megatron_sr1.kernels.delta_rule.continued import continued_convolution, continued_rule
from megatron_sr1.kernels.delta_rule.plan import RowPlan, row_plan

__all__ = [
    "CHUNK",
    "RowPlan",
    "causal_convolution",
    "continued_convolution",
    "continued_rule",
    "gated_delta_rule",
    "row_plan",
]
