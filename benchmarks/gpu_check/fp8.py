"""The policy in FP8 against itself in bf16, in one process: log-probs, gradient norm, speed, memory."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu_check.comparison import Bounds, compare
from benchmarks.gpu_check.policies import made_model, one_rank, size_here
from benchmarks.gpu_check.report import Absent, Report

# nats a token, mean; and relative. 4 bits of mantissa, as in tests/test_precision.py, which has them of smaller models.
BOUNDS = Bounds(logprob=0.15, grad_norm=0.45)


def run(folder: Path) -> Report:
    """With the recipe of the card's generation.

    Raises:
        Absent: the machine or its software has no FP8.
    """
    from megatron_sr1.config import ConfigError, PrecisionConfig
    from megatron_sr1.platform import start_platform
    from megatron_sr1.platform.precision import check_precision

    if not torch.cuda.is_available():
        raise Absent("no CUDA device")
    with one_rank():
        lacks = []
        for recipe in ("blockwise", "mxfp8", "current"):
            try:
                check_precision(PrecisionConfig(dtype="fp8", fp8_recipe=recipe), "te", start_platform())
            except ConfigError as lack:
                lacks.append(str(lack))
                continue
            model = made_model(folder.parent, size_here())
            words = {
                "bf16": ("precision.dtype=bf16",),
                f"fp8 {recipe}": ("precision.dtype=fp8", f"precision.fp8_recipe={recipe}"),
            }
            return compare(model, words, BOUNDS)
        raise Absent(lacks[0])
