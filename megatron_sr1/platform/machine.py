"""What this machine is, in words, for whoever reads a run later."""

from __future__ import annotations

import os
import platform as python_platform
from collections import Counter
from pathlib import Path

import psutil
import torch

_CPUINFO = Path("/proc/cpuinfo")


def machine_words() -> dict[str, str]:
    """Of this process's machine: its processor, memory, and the cards that it may see."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = {"processor": f"{_processor()}, {cores} cores", "system": python_platform.platform(aliased=True)}
    words["memory"] = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        names = Counter(torch.cuda.get_device_name(card) for card in range(torch.cuda.device_count()))
        words["cards of this machine"] = ", ".join(f"{count} x {name}" for name, count in names.items())
    return words


def _processor() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return python_platform.processor() or python_platform.machine()
