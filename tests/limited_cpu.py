"""Run by test_cpu_capabilities in a process whose CPU is limited by its environment: that the limits hold there."""

from __future__ import annotations

import os
import re

import pytest
import torch


def test_torch_uses_no_more_than_it_may() -> None:
    assert torch.backends.cpu.get_cpu_capability() == os.environ["ATEN_CPU_CAPABILITY"].upper()


def test_onednn_uses_no_more_than_it_may(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        torch.nn.functional.conv2d(torch.ones(2, 3, 14, 14), torch.ones(8, 3, 7, 7))
    kernels = re.findall(r"convolution,jit[^,]*:([a-z0-9_]+),", capfd.readouterr().out)
    assert kernels and set(kernels) == {os.environ["ONEDNN_MAX_CPU_ISA"].lower()}
