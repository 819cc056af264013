"""The numerical tests again as on smaller CPUs: other vector widths sum in another order and round otherwise.

A bound that holds only by the luck of one order fails here, before it does on somebody's machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import call_forked

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = ("logprob_oracles", "linear_logprob", "fused_loss", "objective", "objective_liger", "objective_losses")
# Several ranks and Triton's interpreter and compiler: minutes of start-up around the same sums.
LEFT_OUT = "not tensor_parallel and not ddp and not interpreter and not compile"
LIMITS = {"default": ("default", "SSE41"), "avx2": ("avx2", "AVX2")}


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are the names of x86")
@pytest.mark.parametrize("capability", LIMITS)
def test_the_numbers_hold_on_a_smaller_cpu(capability: str) -> None:
    if capability == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this machine lacks avx2")
    aten, onednn = LIMITS[capability]
    limits = {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "OMP_NUM_THREADS": "1"}
    files = ["tests/limited_cpu.py", *(f"tests/test_{name}.py" for name in FILES)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", LEFT_OUT, *files]
    run = subprocess.run(command, cwd=REPOSITORY, env=os.environ | limits, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout.strip().splitlines()[-1])
    assert passed and int(passed[1]) > 200, run.stdout[-2000:]


def test_the_environment_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """More would wait for each other in loops, at the cost of whatever else the machine runs. Torch reads the variable
    when it is imported; without it the platform changes what torch has, here one."""
    code = "from tests.test_cpu_capabilities import say_threads; say_threads()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = [run.stdout, call_forked(say_threads)]
    assert [int(printed.splitlines()[-1]) for printed in found] == [1, os.cpu_count()], found


def say_threads() -> None:
    from megatron_sr1.platform import start_platform

    start_platform()
    print(torch.get_num_threads())
