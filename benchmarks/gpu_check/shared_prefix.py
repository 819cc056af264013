"""train.shared_prefix: a prompt once for its eight samples, against the same policy that has it for each."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu_check.comparison import Bounds, compare
from benchmarks.gpu_check.policies import made_model, one_rank, size_here
from benchmarks.gpu_check.report import Report

# of bf16, with other kernels of attention; in fp32 on a CPU both are the same to 1e-5 (tests/test_shared_prefix.py)
BOUNDS = Bounds(logprob=0.03, grad_norm=0.03)


def run(folder: Path) -> Report:
    """In bf16."""
    with one_rank():
        model = made_model(folder.parent, size_here())
        values = (("for each", "false"), ("once", "true"))
        words = {name: ("precision.dtype=bf16", f"train.shared_prefix={value}") for name, value in values}
        return compare(model, words, BOUNDS, siblings=True)
