"""torch.profiler's trace of one training step of the policy; which operations take its time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.policies import build, made_model, one_rank, seconds_of, size_here
from benchmarks.gpu_check.report import Figure, Report, Table

FILE = "trace.json.gz"
SHOWN = 12  # operations in the table


def run(folder: Path) -> Report:
    """The trace stays in the work folder, for Perfetto or chrome://tracing. Wrong: it shows no work of the device."""
    on_card = torch.cuda.is_available()
    size = size_here()
    with one_rank():
        model = made_model(folder.parent, size)
        trained = build(model, size, *(["precision.dtype=bf16"] if on_card else []))
        plain = seconds_of({"step": trained.step}, 3)["step"]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
        with profile(activities=activities) as recorded:
            trained.step()
            if on_card:
                torch.cuda.synchronize()
        recorded.export_chrome_trace(str(folder / FILE))
    totals = own_times(recorded.key_averages(), "CUDA" if on_card else "CPU")
    whole = sum(microseconds for microseconds, _ in totals.values())
    most = sorted(totals.items(), key=lambda item: -item[1][0])[:SHOWN]
    rows = [(name[:100], us / 1e3, us / max(whole, 1e-9), count) for name, (us, count) in most]
    figures: dict[str, Figure] = {
        "ms of a step, not recorded": 1e3 * plain,
        "tokens/s, not recorded": trained.num_tokens / plain,
        "ms of its operations, recorded": whole / 1e3,
        "part of a step that the device works": whole / 1e6 / plain if on_card else None,
        "trace": f"runs/gpu_check/trace/{FILE}",
        "trace MiB": (folder / FILE).stat().st_size / 2**20,
    }
    wrong = [] if whole > 0 else ["the trace has no operation that took time on the device"]
    columns = ("operation", "ms", "part", "calls")
    return Report(figures, [Table("what takes the time", columns, rows)], wrong)


def own_times(events: Iterable[Any], device: str) -> dict[str, tuple[float, int]]:
    """By name, microseconds without what is inside, and calls; of the CPU's operations or of the card's kernels. An
    operation of the CPU has its kernels' time too, and a user's annotation what is below it: they would count twice."""
    found = [event for event in events if event.device_type.name == device and not event.is_user_annotation]
    times = ((e.key, e.self_cpu_time_total if device == "CPU" else e.self_device_time_total, e.count) for e in found)
    return {key: (microseconds, count) for key, microseconds, count in times}
