"""The vision tower's work over the ranks that share a micro-batch: replicated, split by count, balanced.

    python -m benchmarks.vision_balance --images 1 3 8 32 --scale 0.1

The mix: log-normal numbers of pixels (median 600 thousand, sigma 0.8: photographs, charts, screenshots), clamped to
262,144 ... 4,194,304, log-normal aspect ratios (median 1.2, sigma 0.4, at most 3), and the processor's rounding to
whole visual tokens.

    replicated  every rank encodes every image
    by count    image i goes to rank i modulo ranks, whatever its size
    balanced    what the policy does: longest first, the longest split where that pays

First table: patches of a rank at the real sizes of both towers, means over the micro-batches. `busiest` decides the
time; `spread` is busiest / mean of the ranks; `moved` is the share of the patches whose keys and values are exchanged.
Second table: forward and backward on gloo ranks of this machine, towers narrowed and images scaled down in pixels by
--scale. `wall` is the median time of a micro-batch; `busiest` is the median of the CPU time of its busiest rank's main
thread, which is what counts where there are fewer cores than ranks. In parentheses: the ratio to replicated.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from megatron_sr1.ahead import Later
from megatron_sr1.platform import start_platform
from megatron_sr1.types import EncodedImage, Normalisation

MIN_PIXELS, MAX_PIXELS = 262_144, 4_194_304
FULL_SIZE = {"Qwen2.5-VL": {"hidden_size": 1280, "intermediate_size": 3420}, "Qwen3-VL": {}}
NARROW = {"hidden_size": 128, "intermediate_size": 344, "num_heads": 4, "out_hidden_size": 256}
DEPTHS = {"Qwen2.5-VL": {"depth": 8, "fullatt_block_indexes": [7]}, "Qwen3-VL": {"depth": 6}}
DEEPSTACK = {"Qwen2.5-VL": {}, "Qwen3-VL": {"deepstack_visual_indexes": [1, 2, 3]}}
Grid = tuple[int, int, int]


def make_tower(name: str, device: str, **sizes: object) -> torch.nn.Module:
    """Qwen2.5-VL's or Qwen3-VL's tower, of the real model's size where `sizes` say nothing else."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    if name == "Qwen2.5-VL":
        kind, config = qwen2_5.Qwen2_5_VisionTransformerPretrainedModel, qwen2_5.Qwen2_5_VLVisionConfig(**sizes)
    else:
        kind, config = qwen3.Qwen3VLVisionModel, qwen3.Qwen3VLVisionConfig(**sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def draw_grids(generator: random.Random, num_images: int, patch_size: int, scale: float) -> list[Grid]:
    """Grids of the mix, in patches."""
    token = 2 * patch_size
    grids = []
    for _ in range(num_images):
        pixels = min(max(generator.lognormvariate(math.log(600_000), 0.8), MIN_PIXELS), MAX_PIXELS) * scale
        aspect = min(max(generator.lognormvariate(math.log(1.2), 0.4), 1 / 3), 3.0)
        height = max(1, round(math.sqrt(pixels / aspect) / token))
        width = max(1, round(math.sqrt(pixels * aspect) / token))
        grids.append((1, 2 * height, 2 * width))
    return grids


def make_plans(tower: torch.nn.Module, grids: Sequence[Grid], num_ranks: int) -> dict[str, object]:
    """The plans that share the work. Replicated is no plan: every rank has all."""
    from megatron_sr1.policy.vision import ImagePiece, VisionPlan, plan_grids

    whole = [ImagePiece(index, 0, height * width) for index, (_, height, width) in enumerate(grids)]
    by_count = VisionPlan(tuple(tuple(whole[rank::num_ranks]) for rank in range(num_ranks)), frozenset())
    return {"by count": by_count, "balanced": plan_grids(tower, grids, num_ranks)}


# ---------------------------------------------------------------- patches at the real sizes
def print_patches(arguments: argparse.Namespace) -> None:
    print(f"{'patches of a rank':44}{'busiest':>18}{'mean':>9}{'spread':>9}{'moved':>8}")
    for name in FULL_SIZE:
        tower = make_tower(name, "meta", **FULL_SIZE[name])
        for num_ranks in (2, 4, 8):
            for num_images in arguments.images:
                generator = random.Random(0)
                rows: dict[str, list[tuple[float, float, float]]] = {"replicated": [], "by count": [], "balanced": []}
                for _ in range(arguments.batches):
                    grids = draw_grids(generator, num_images, tower.patch_size, 1.0)
                    total = sum(height * width for _, height, width in grids)
                    rows["replicated"].append((total, total, 0.0))
                    for strategy, plan in make_plans(tower, grids, num_ranks).items():
                        moved = plan.num_shared_patches / total
                        rows[strategy].append((max(plan.patches), total / num_ranks, moved))
                _print_patch_rows(f"{name}, {num_ranks} ranks, {num_images} images", rows)


def _print_patch_rows(label: str, rows: dict[str, list[tuple[float, float, float]]]) -> None:
    base = statistics.mean(row[0] for row in rows["replicated"])
    for strategy, batches in rows.items():
        busiest, mean, moved = (statistics.mean(column) for column in zip(*batches, strict=True))
        cells = f"{busiest:9.0f} ({busiest / base:5.2f}x){mean:9.0f}{busiest / mean:8.2f}x{moved:8.2f}"
        print(f"{label:32}{strategy:12}{cells}")
        label = ""


# ---------------------------------------------------------------- time on ranks of this machine
def print_times(arguments: argparse.Namespace) -> None:
    print(f"\n{'ms a micro-batch, forward + backward':44}{'wall':>20}{'busiest':>20}")
    for num_ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            torch.multiprocessing.spawn(_measure_rank, args=(num_ranks, store, arguments), nprocs=num_ranks)


def _measure_rank(rank: int, num_ranks: int, store: str, arguments: argparse.Namespace) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    start_platform()
    torch.set_num_threads(1)
    for name in FULL_SIZE:
        tower = make_tower(name, "cpu", **NARROW, **DEPTHS[name], **DEEPSTACK[name])
        for num_images in arguments.images:
            rows = _measure(tower, num_images, arguments)
            if rank == 0:
                _print_times(f"{name}, {num_ranks} ranks, {num_images} images", rows)
    torch.distributed.destroy_process_group()


def _measure(
    tower: torch.nn.Module, num_images: int, arguments: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """(wall, busiest) of each timed micro-batch, the strategies taking turns."""
    from megatron_sr1.policy.vision import encode_images

    world = torch.distributed.group.WORLD
    alone = torch.distributed.new_group([world.rank()], use_local_synchronization=True)
    config = tower.config
    channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = random.Random(0)
    rows: dict[str, list[tuple[float, float]]] = {"replicated": [], "by count": [], "balanced": []}
    for repeat in range(arguments.repeats + 1):
        grids = draw_grids(generator, num_images, tower.patch_size, arguments.scale)
        pixels = [torch.randn(height * width, channels) for _, height, width in grids]
        images = [
            EncodedImage(grid, Later(lambda p=p: p), Normalisation(1.0, (0.0,), (1.0,)))
            for grid, p in zip(grids, pixels, strict=True)
        ]
        plans = {"replicated": (alone, make_plans(tower, grids, 1)["by count"])}
        plans |= {name: (world, plan) for name, plan in make_plans(tower, grids, world.size()).items()}
        for strategy, (group, plan) in plans.items():
            encode = partial(encode_images, tower, images, plan, group, alone, recompute=False)
            times = _time_step(tower, encode)
            if repeat > 0:  # the first warms up
                rows[strategy].append(times)
    return rows


def _time_step(tower: torch.nn.Module, encode: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Wall time of the slowest rank, and the largest CPU time of a rank's main thread, ms."""
    tower.zero_grad()
    torch.distributed.barrier()
    wall, busy = time.perf_counter(), time.thread_time()
    encode().square().sum().backward()
    times = torch.tensor([time.perf_counter() - wall, time.thread_time() - busy])
    torch.distributed.all_reduce(times, op=torch.distributed.ReduceOp.MAX)
    return 1e3 * times[0].item(), 1e3 * times[1].item()


def _print_times(label: str, rows: dict[str, list[tuple[float, float]]]) -> None:
    bases: list[float] = []
    for strategy, times in rows.items():
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        bases = bases or medians
        cells = (f"{value:9.0f} ({value / base:5.2f}x)" for value, base in zip(medians, bases, strict=True))
        print(f"{label:32}{strategy:12}" + "".join(f"{cell:>20}" for cell in cells), flush=True)
        label = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 3, 8, 32], help="distinct images of a micro-batch")
    parser.add_argument("--batches", type=int, default=50, help="micro-batches of the first table")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], help="group sizes of the second table")
    parser.add_argument("--repeats", type=int, default=5, help="micro-batches of the second table")
    parser.add_argument("--scale", type=float, default=0.1, help="pixels of the second table's images, of the real")
    arguments = parser.parse_args()
    start_platform()
    print_patches(arguments)
    torch.distributed.destroy_process_group()
    print_times(arguments)


if __name__ == "__main__":
    main()
