"""model.fused: SwiGLU as one kernel and weight gradients added by the products, against the same policy without."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu_check.comparison import Bounds, compare
from benchmarks.gpu_check.policies import made_model, one_rank, size_here
from benchmarks.gpu_check.report import Absent, Report

# Several micro-batches: a gradient that was added twice, or not, would change the norm by far more. Activations round
# otherwise where SwiGLU keeps its middle in fp32.
BOUNDS = Bounds(logprob=0.03, grad_norm=0.03)


def run(folder: Path) -> Report:
    """In bf16.

    Raises:
        Absent: there is no Transformer Engine, whose layers alone are fused.
    """
    from megatron_sr1.config import ConfigError
    from megatron_sr1.platform import start_platform
    from megatron_sr1.policy.layers.specs import layer_spec_name

    with one_rank():
        try:
            layer_spec_name("te", start_platform(), "bf16")
        except ConfigError as lack:
            raise Absent(str(lack)) from lack
        model = made_model(folder.parent, size_here())
        base = ("precision.dtype=bf16", "model.layer_spec=te")
        words = {name: (*base, f"model.fused={value}") for name, value in (("apart", "false"), ("fused", "true"))}
        return compare(model, words, BOUNDS)
