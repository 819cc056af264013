"""Weights from the trainer to the engines beside it: benchmarks/weight_sync.py on all cards, or two ranks of a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.gpu_check.report import Report, Table
from benchmarks.weight_sync import measured


def run(folder: Path) -> Report:
    """Seconds and GB/s of each part. Wrong: nothing by itself; a sync whose checksums differ ends the process."""
    count = torch.cuda.device_count()
    ranks = 1 << (count.bit_length() - 1) if count else 2  # heads divide among powers of two
    arguments = argparse.Namespace(
        nproc=ranks,
        tensor=min(ranks, 2),
        pipeline=1,
        engine_tensor=1,
        bucket_mib=256,
        layers=48 if count else 2,
        dtype="bf16" if count else "fp32",
    )
    size, parts = measured(folder / "sync", arguments)
    rows = [(part.name, part.seconds, size / 1e9 / part.seconds, part.memory_mib) for part in parts]
    speed = {part.name: size / 1e9 / part.seconds for part in parts}
    figures = {
        "GB": round(size / 1e9, 3),
        "ranks": ranks,
        "tensor": arguments.tensor,
        "dtype": arguments.dtype,
        "sync GB/s": speed["sync"],
    }
    columns = ("part", "seconds", "GB/s", "host memory MiB")
    return Report(figures, [Table("weight sync", columns, rows)])
