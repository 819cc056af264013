"""How fast, how flat and how soon: the stream of samples, beside a plain webdataset pipeline on the same shards.

    python -m benchmarks.data --folder /tmp/shards

Every figure is taken by a process of its own. Images are photographs in kind: smooth noise, JPEG of quality 90, 2.6
bits a pixel. Samples are taken in batches of 32, as a step takes them.

    throughput  one epoch of shuffled, decoded samples (json and RGB pixels), the two in turn; the best run of each
                counts, because a busy machine only ever makes one slower; and the same by the CPU seconds it took
                    ours         SampleFeed: exact order, checksums, `workers` threads that decode and that read
                    webdataset   WebDataset(shardshuffle).shuffle(1000).decode("pilrgb").batched(32); with several
                                 workers torch's DataLoader over it, of as many processes that send such batches
    resume      from opening the feed's state to the first sample, at position 0 and at 10^6
    memory      resident set while streaming: after the first tenth of the samples, and at the end
    start-up    opening 10^5 samples (text only, 1000 a shard), with indices and by reading all headers
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_sr1.data import Quarantine, SampleFeed, SampleStream, ShardDataset
from megatron_sr1.data.index import index_path, write_index
from megatron_sr1.data.scan import scan_shard
from megatron_sr1.data.state import StreamState

BATCH = 32
Figures = dict[str, float]


# ---------------------------------------------------------------- shards
def _photo(seed: int, size: tuple[int, int]) -> bytes:
    """The bytes of the member: webdataset's own encoder of images has no quality but 100."""
    grain = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(grain).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_shards(folder: Path, num_samples: int, per_shard: int, size: tuple[int, int] | None) -> list[Path]:
    """Indexed shards of one image per sample, or of text only; made once."""
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    shards = [folder / f"s-{number:05d}.tar" for number in range(num_samples // per_shard)]
    for number, shard in enumerate(shards):
        if index_path(shard).exists():
            continue
        with TarWriter(str(shard), encoder=True) as writer:
            for i in range(number * per_shard, (number + 1) * per_shard):
                members: dict[str, object] = {"json": {"problem": f"What is in picture {i}?", "answer": str(i)}}
                if size is not None:
                    members["0.jpg"] = _photo(i, size)
                writer.write({"__key__": f"{i:07d}", **members})
        write_index(shard, scan_shard(shard, contents=True)[0])
    return shards


# ---------------------------------------------------------------- what is measured, each in a process
def _resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _used(start: tuple[float, float], num: int, num_bytes: int) -> Figures:
    seconds, cpu = time.perf_counter() - start[0], _cpu_seconds() - start[1]
    return {"samples/s": num / seconds, "MB/s": num_bytes / seconds / 1e6, "samples/cpu s": num / cpu}


def ours(shards: list[Path], workers: int) -> Figures:
    """One epoch of the feed."""
    start = (time.perf_counter(), _cpu_seconds())
    dataset = ShardDataset(shards)
    with SampleFeed(SampleStream(dataset, 1, window=1000), Quarantine(0), workers=workers) as feed:
        for _ in range(len(dataset) // BATCH):
            feed.finish(feed.next(BATCH))
    return _used(start, len(dataset) // BATCH * BATCH, sum(shard.stat().st_size for shard in shards))


def plain(shards: list[Path], workers: int) -> Figures:
    """One epoch of webdataset."""
    import webdataset
    from torch.utils.data import DataLoader

    start = (time.perf_counter(), _cpu_seconds())
    urls = [str(shard) for shard in shards]
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode("pilrgb")
    batches: Iterable[list] = pipeline.batched(BATCH, collation_fn=list)
    if workers > 1:
        batches = DataLoader(batches, num_workers=workers, batch_size=None)
    num = 0
    for batch in batches:
        assert all(sample["0.jpg"].load() and sample["json"] for sample in batch)
        num += len(batch)
    del batches, pipeline  # ends the loader's processes
    return _used(start, num, sum(shard.stat().st_size for shard in shards))


def resume(shards: list[Path], position: int) -> Figures:
    """Seconds to the first sample after `position`."""
    dataset = ShardDataset(shards)
    stream = SampleStream(dataset, 1, window=1000)
    with SampleFeed(stream, Quarantine(0)) as feed:
        state = StreamState(**(vars(feed.state()) | {"position": position}))
    start = time.perf_counter()
    with SampleFeed(SampleStream(dataset, 1, window=1000), Quarantine(0)) as feed:
        feed.restore(state)
        feed.next(1)
        return {"seconds": time.perf_counter() - start}


def memory(shards: list[Path], workers: int) -> Figures:
    """Resident bytes early and late in three epochs."""
    dataset, marks = ShardDataset(shards), []
    with SampleFeed(SampleStream(dataset, 1, window=1000), Quarantine(0), workers=workers) as feed:
        for _ in range(3 * len(dataset) // BATCH):
            feed.finish(feed.next(BATCH))
            marks.append(_resident() / 2**20)
    return {"MiB after a tenth": max(marks[: len(marks) // 10]), "MiB at most": max(marks), "MiB at the end": marks[-1]}


def startup(shards: list[Path], with_index: int) -> Figures:
    """Seconds to an open stream, and the memory that it takes."""
    before, start = _resident(), time.perf_counter()
    if with_index:
        stream = SampleStream(ShardDataset(shards), 1)
        found = stream.fingerprint
    else:
        found = "".join(scan_shard(shard)[0].fingerprint for shard in shards)
    assert found
    return {"seconds": time.perf_counter() - start, "MiB": (_resident() - before) / 2**20}


MEASURES: dict[str, Callable[[list[Path], int], Figures]] = {
    function.__name__: function for function in (ours, plain, resume, memory, startup)
}


def _measured(folder: Path, name: str, argument: int) -> Figures:
    command = [sys.executable, "-m", "benchmarks.data", "--folder", str(folder), "--measure", name, str(argument)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480))
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "ARGUMENT"), help="one figure, as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure[0]](sorted(args.folder.glob("*.tar")), int(args.measure[1]))))
        return
    photos, texts = args.folder / "photos", args.folder / "texts"
    make_shards(photos, args.samples, 100, tuple(args.size))
    make_shards(texts, 100_000, 1000, None)
    for workers in (1, 2):
        runs: dict[str, list[Figures]] = {"plain": [], "ours": []}
        for _ in range(args.repeats):
            for name, figures in runs.items():
                figures.append(_measured(photos, name, workers))
        for name, figures in runs.items():
            best = {key: max(run[key] for run in figures) for key in figures[0]}
            print(f"throughput, {workers} workers, {name:6}", "  ".join(f"{v:8.1f} {k}" for k, v in best.items()))
    rows = [("resume", photos, 0), ("resume", photos, 10**6), ("memory", photos, 2), ("startup", texts, 1)]
    for name, folder, argument in [*rows, ("startup", texts, 0)]:
        found = [_measured(folder, name, argument) for _ in range(min(args.repeats, 3))]
        print(f"{name} {argument}", "  ".join(f"{min(run[key] for run in found):.3f} {key}" for key in found[0]))


if __name__ == "__main__":
    main()
