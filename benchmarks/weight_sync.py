"""Weight sync from a trainer into the engines beside it: seconds, GB/s, peak extra memory; against a checkpoint's way.

    python -m benchmarks.weight_sync --nproc 2 --tensor 2 --engine-tensor 1

Makes a random Qwen2.5-VL of about 1.3 GB in fp32 (`--layers` for more), loads it into a policy without optimizer and
into vLLM engines on the same ranks, and measures, the slowest rank each:

    export      all tensors leave the trainer's layout, and nobody keeps them
    sync        the same, into the engines; `checked` with the checksums of every tensor on both sides
    save        the main rank writes the tensors as a Hugging Face directory
    reload      every engine reads that directory (from the page cache: it was just written)

A time ends when the device is done. GB are those that the trainer sends: half of fp32's with `--dtype bf16`.
Memory is how much the peak resident set (VmHWM) of a rank grows during the part, the largest over the ranks; the
device's own is not in it. It holds one bucket, the tensors of one parameter, and what vLLM keeps of a layer until it
is complete.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.setting import empty_folder, write_model

MIB = 1 << 20
SHAPE = {"hidden": 1024, "heads": 8, "feed_forward": 4096, "vocab": 65536}


@dataclass(frozen=True)
class Part:
    """One measured part, on one rank."""

    name: str
    seconds: float
    memory_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=2, help="of the trainer's layout")
    parser.add_argument("--pipeline", type=int, default=1, help="of the trainer's layout")
    parser.add_argument("--engine-tensor", type=int, default=1, help="ranks of one engine")
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the policy")
    parser.add_argument("--folder", type=Path, help="a new folder on the disk to use; default: in the system's own")
    args = parser.parse_args()
    with empty_folder(args.folder, "benchmark_weight_sync_") as folder:
        size, parts = measured(folder, args)
    print(f"\n{size / 1e9:.2f} GB, nproc={args.nproc} tensor={args.tensor} pipeline={args.pipeline} " + args.dtype)
    print(f"{'part':16}{'seconds':>10}{'GB/s':>10}{'peak MiB':>10}")
    for part in parts:
        print(f"{part.name:16}{part.seconds:10.2f}{size / 1e9 / part.seconds:10.2f}{part.memory_mib:10.0f}")


def measured(folder: Path, args: argparse.Namespace) -> tuple[int, list[Part]]:
    """Bytes of all weights as they are sent, and the parts, each of the slowest and the fullest rank."""
    import torch.multiprocessing

    from megatron_sr1.platform.runtime import run_on_ranks

    options = (
        f"model.hf_dir={folder / 'model'}",
        f"precision.dtype={args.dtype}",
        f"nproc={args.nproc}",
        f"layout.tensor={args.tensor}",
        f"layout.pipeline={args.pipeline}",
        f"rollout.engine_tensor={args.engine_tensor}",
        f"rollout.sync_bucket_mib={args.bucket_mib}",
    )
    torch.multiprocessing.spawn(make_model, args=(str(folder / "model"), args.layers), nprocs=1)
    run_on_ranks(measure, args.nproc, str(folder), options)
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))  # in fp32
    slowest = [
        Part(parts[0]["name"], max(part["seconds"] for part in parts), max(part["memory_mib"] for part in parts))
        for parts in zip(*ranks, strict=True)
    ]
    return (size // 2 if args.dtype == "bf16" else size), slowest


def make_model(_: int, model_dir: str, layers: int) -> None:
    write_model(Path(model_dir), ["What is the sum of all digits?"], layers=layers, **SHAPE)


def measure(folder: str, options: tuple[str, ...]) -> None:
    """On every rank: policy and engine, then the parts one after another."""
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.config import load_config
    from megatron_sr1.policy.scorer import Scorer
    from megatron_sr1.rollout import Engine, EngineLimits
    from megatron_sr1.weights import HfTensors, write_hf_dir

    config = load_config(None, list(options))
    policy = Scorer(config, platform)
    engine = Engine(
        config.model.hf_dir,
        EngineLimits(512, 32, kv_cache_gib=0.25, max_images=1, seed=0, tensor_parallel=config.rollout.engine_tensor),
        checksum_every=1 << 30,
    )
    parts: list[Part] = []
    saved = Path(folder) / "saved"
    with _measured("sync, checked", parts):
        engine.update_weights(policy.hf_weights(), 1)
    with _measured("export", parts):
        _drain(policy.hf_weights())
    with _measured("sync", parts):
        engine.update_weights(policy.hf_weights(), 2)
    with _measured("save", parts):
        if platform.is_main:
            write_hf_dir(policy.hf_weights(), config.model.hf_dir, saved)
        else:
            _drain(policy.hf_weights())
    tensors = HfTensors(saved)
    with _measured("reload", parts):
        engine.update_weights(((name, tensors[name]) for name in tensors.tensors), 3)
    Path(folder, f"rank{platform.rank}.json").write_text(json.dumps([vars(part) for part in parts]))


def _drain(weights: Iterator[Any]) -> None:
    for _ in weights:
        pass


@contextmanager
def _measured(name: str, parts: list[Part]) -> Iterator[None]:
    _meet()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
    before, start = _status("VmRSS"), time.perf_counter()
    yield
    _meet()
    parts.append(Part(name, time.perf_counter() - start, (_status("VmHWM") - before) / MIB))


def _meet() -> None:
    """All ranks, with all that was asked of their devices done."""
    import torch.distributed

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    torch.distributed.barrier()


def _status(key: str) -> int:
    """Of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main()
