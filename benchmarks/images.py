"""What it takes to make an image's patches, and how many bytes they are: as floats by transformers, and as bytes.

    python -m benchmarks.images --megapixels 0.3 1 4.2 --runs 5

Both ways take turns in one run, in one thread; milliseconds are medians. `ahead` is the wall time of all images, shared
by --threads threads, as rollouts prepare them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.setting import write_model
from megatron_sr1.processor import Processor

MAX_PIXELS = 16 * 10**6
SIZES = ("floats MB", "bytes MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.3, 1.0, 4.2])
    parser.add_argument("--runs", type=int, default=5, help="of each way")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.runs < 1 or args.threads < 1 or not all(0.01 <= size <= 16 for size in args.megapixels):
        parser.error("--runs and --threads must be 1 or more, --megapixels from 0.01 to 16")
    with tempfile.TemporaryDirectory() as folder:
        processor = _processor(Path(folder), args.threads)
        print("megapixels" + "".join(f"{name:>12}" for name in ("floats ms", "bytes ms", "ratio", *SIZES, "ahead")))
        for megapixels in args.megapixels:
            print(_row(processor, megapixels, args.runs))


def _processor(folder: Path, num_threads: int) -> Processor:
    sizes = {"hidden": 256, "layers": 1, "feed_forward": 256, "heads": 2, "vocab": 512}
    write_model(folder / "model", ["how many digits"] * 9, **sizes)
    processor = Processor.from_pretrained(str(folder / "model"), num_threads=num_threads)
    processor._image_processor.size["longest_edge"] = MAX_PIXELS
    return processor


def _row(processor: Processor, megapixels: float, runs: int) -> str:
    height = int((megapixels * 1e6 * 3 / 4) ** 0.5)
    images = [Image.effect_noise((height * 4 // 3, height), 60).convert("RGB") for _ in range(runs)]
    settings: Any = processor._image_processor
    floats: list[tuple[float, int]] = []
    patches: list[tuple[float, int]] = []
    for image in images:
        floats.append(_timed(lambda image=image: settings(images=[image], return_tensors="pt")["pixel_values"]))
        patches.append(_timed(lambda image=image: processor.encode_image(image.copy()).patches()))
    start = time.perf_counter()
    encoded = [processor.encode_image(image) for image in images]
    for each in encoded:
        each.patches.start()
    for each in encoded:
        each.patches()
    ahead = (time.perf_counter() - start) / sum(seconds for seconds, _ in patches)
    slow, quick = (statistics.median(seconds for seconds, _ in found) * 1e3 for found in (floats, patches))
    sizes = "".join(f"{found[0][1] / 1e6:12.1f}" for found in (floats, patches))
    return f"{megapixels:10.1f}{slow:12.1f}{quick:12.1f}{quick / slow:12.2f}{sizes}{ahead:12.2f}"


def _timed(make: Callable[[], Any]) -> tuple[float, int]:
    start = time.perf_counter()
    made = make()
    return time.perf_counter() - start, made.numel() * made.element_size()


if __name__ == "__main__":
    main()
