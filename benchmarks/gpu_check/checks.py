"""The checks, by worth: what is first still runs where the time is not enough for all."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu_check.runner import Check

BUDGET_S = 25 * 60.0
MODEL = "model"  # the folder, beside those of the checks, of a model that several share


def _check(name: str, what: str, limit_s: float, *, needs_cuda: bool = False, module: str = "") -> Check:
    command = (sys.executable, "-m", "benchmarks.gpu_check.one", module or name)
    return Check(name, what, command, limit_s, needs_cuda)


CHECKS: Sequence[Check] = (
    _check("environment", "cards, driver, versions of packages, commit", 120),
    _check("gpu_tests", "every test that is marked gpu", 420, needs_cuda=True),
    _check("cold_start", "supervised training on images, killed after a checkpoint and gone on: no engine", 240),
    _check("canary", "engine: sleep, wake, restart, stale images; decoding from graphs against eager", 240),
    _check("quickstart", "20 steps of the quickstart after a short cold start", 600),
    _check("kernels", "log-probs and loss against the installed peers", 180),
    _check("fp8", "policy in FP8 against bf16: log-probs, gradients, speed", 150, needs_cuda=True),
    _check("weight_sync", "weights from the trainer to the engines, GB/s", 240),
    _check("resume", "a run killed after a checkpoint goes on as one that was not", 420),
    _check("fused", "fused SwiGLU and weight gradients, with and without", 150, needs_cuda=True),
    _check("shared_prefix", "a prompt once for its samples against once for each: log-probs, gradients, speed", 150),
    _check("trace", "torch.profiler's trace of a training step", 120),
    _check("largest", "3 steps of the largest recipe that fits, random weights", 420, needs_cuda=True),
)
