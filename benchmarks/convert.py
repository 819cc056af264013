"""Conversion of a checkpoint of real shapes, there and back: time, peak memory, and whether every bit is the same.

    python -m benchmarks.convert --config examples/models/Qwen2.5-VL-3B-Instruct/config.json --nproc 1

Makes random BF16 weights of the shapes that config.json calls for (7.5 GB for 3B; `--layers 4` for fewer), converts
them to Megatron and back and compares both folders. Needs three times the weights' size on the disk of `--folder`,
which is removed at the end.

Memory is how much the peak resident set (VmHWM) of a process grows beyond what its imports take, the largest over the
processes, in MiB: no file is mapped, so all of it is the converter's own. The bound is twice the largest tensor plus
one output shard (5 GB, or all of the weights where they are less).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.setting import empty_folder

MIB = 1 << 20
POOL_ELEMENTS = 1 << 25  # random numbers that weights are cut from, each at a place of its own


@dataclass(frozen=True)
class Result:
    """One direction."""

    name: str
    seconds: float
    memory_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/models/Qwen2.5-VL-3B-Instruct/config.json"))
    parser.add_argument("--layers", type=int, help="of the language model, instead of all")
    parser.add_argument("--folder", type=Path, help="a new folder on the disk to use; default: in the system's own")
    parser.add_argument("--nproc", type=int, default=1)
    args = parser.parse_args()
    with empty_folder(args.folder, "benchmark_convert_") as folder:
        _run(folder, args.config, args.layers, args.nproc)


def _run(folder: Path, config: Path, layers: int | None, nproc: int) -> None:
    from megatron_sr1.platform import start_platform

    hf, megatron, back = (folder / name for name in ("hf", "megatron", "back"))
    results = []
    _write_config(hf, config, layers)
    _in_processes(make_weights, 1, str(hf))
    for function, source, out in ((_there, hf, megatron), (_back, megatron, back)):
        out.mkdir()
        started = time.perf_counter()
        _in_processes(function, nproc, str(source), str(out), str(folder))
        seconds = time.perf_counter() - started
        peaks = [json.loads(path.read_text()) for path in folder.glob("peak_*.json")]
        results.append(Result(out.name, max(peak["seconds"] for peak in peaks), max(peak["mib"] for peak in peaks)))
        print(f"{out.name}: {seconds:.1f} s with the processes' imports", flush=True)
    start_platform()
    from megatron_sr1.convert.verify import compare
    from megatron_sr1.weights import HfTensors

    first = HfTensors(hf)
    started = time.perf_counter()
    differ = [item.name for item in compare(first, HfTensors(back), lambda done, total: None) if not item.equal]
    _report(results, [info.nbytes for info in first.tensors.values()], nproc)
    print(f"{len(first.tensors)} tensors compared in {time.perf_counter() - started:.1f} s, {len(differ)} differ")
    assert not differ, differ


def _report(results: list[Result], sizes: list[int], nproc: int) -> None:
    total = sum(sizes)
    bound = (2 * max(sizes) + min(total, 5_000_000_000)) / MIB
    print(f"\n{total / 1e9:.2f} GB, largest tensor {max(sizes) / MIB:.0f} MiB, {nproc} processes")
    print(f"{'to':10}{'seconds':>10}{'GB/s':>10}{'peak MiB':>10}{'bound MiB':>11}")
    for result in results:
        speed = total / 1e9 / result.seconds
        print(f"{result.name:10}{result.seconds:10.1f}{speed:10.2f}{result.memory_mib:10.0f}{bound:11.0f}")


def _write_config(hf: Path, config: Path, layers: int | None) -> None:
    hf.mkdir()
    tree = json.loads(config.read_text())
    if layers is not None:
        text = tree.get("text_config", tree)
        for part in (tree, text):
            for key in ("num_hidden_layers", "max_window_layers"):
                if key in part:
                    part[key] = layers
            if "layer_types" in part:
                part["layer_types"] = part["layer_types"][:layers]
    (hf / "config.json").write_text(json.dumps(tree))


def make_weights(hf: str) -> None:
    """Random weights of all shapes that config.json calls for."""
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron_sr1.convert.layout import hf_shapes, model_slots
    from megatron_sr1.weights.hf_dir import row_blocks
    from megatron_sr1.weights.hf_shards import PlannedShards
    from megatron_sr1.weights.safetensors import TensorInfo

    tensors = {name: TensorInfo(torch.bfloat16, shapes[0]) for name, shapes in hf_shapes(model_slots(hf)).items()}
    shards = PlannedShards(Path(hf), tensors)
    shards.create()
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL_ELEMENTS, generator=generator).bfloat16()
    for name, info in tensors.items():
        for start, stop in row_blocks(info):
            shape = (stop - start, *info.shape[1:])
            needed = TensorInfo(info.dtype, shape).nbytes // info.dtype.itemsize
            first = int(torch.randint(POOL_ELEMENTS, (), generator=generator))
            shards.write(name, pool.roll(-first).repeat(-(-needed // POOL_ELEMENTS))[:needed].view(shape), start)


def _there(source: str, out: str, folder: str) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.convert.save import hf_to_megatron

    baseline, started = _reset_peak(), time.perf_counter()
    hf_to_megatron(source, Path(out), platform, lambda done, total: None)
    _leave_peak(Path(folder), platform.rank, baseline, started)


def _back(source: str, out: str, folder: str) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.convert.export import megatron_to_hf

    baseline, started = _reset_peak(), time.perf_counter()
    megatron_to_hf(source, None, Path(out), platform, lambda done, total: None)
    _leave_peak(Path(folder), platform.rank, baseline, started)


def _in_processes(function: Callable[..., None], nproc: int, *arguments: str) -> None:
    """On fresh processes even where there is one, so that no earlier peak counts."""
    from torch.multiprocessing import spawn

    spawn(_first, args=(function, nproc, arguments), nprocs=1)


def _first(_: int, function: Callable[..., None], nproc: int, arguments: tuple[str, ...]) -> None:
    from megatron_sr1.platform import run_on_ranks

    run_on_ranks(function, nproc, *arguments)


def _reset_peak() -> float:
    """Sets the peak to what is resident now and returns that, MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(what: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) / 1024


def _leave_peak(folder: Path, rank: int, baseline: float, started: float) -> None:
    peak = {"seconds": time.perf_counter() - started, "mib": _resident("VmHWM") - baseline}
    (folder / f"peak_{rank}.json").write_text(json.dumps(peak))


if __name__ == "__main__":
    main()
