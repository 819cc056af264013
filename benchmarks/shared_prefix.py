"""What it saves to have a prompt in a row once for its samples: seconds and memory of training, on this machine.

    python -m benchmarks.shared_prefix --rounds 3

One optimizer step (forward, backward, update) of the same responses, with and without, in alternation, each in a
process of its own; the better round counts. Gradients are those of whole sequences (tests/test_shared_prefix.py), and
the two gradient norms are printed side by side. Mixes, of 8 samples a prompt with a second pass for each:

    quickstart   32 prompts of 60 tokens and an image of 56 x 84 pixels, responses of 10 to 50 tokens; the tiny model of
                 `make quickstart`
    megapixel    prompts of 170 tokens and an image of one megapixel, about 1300 visual tokens; responses of the length
                 mix of benchmarks/packing.py; 4 layers of width 512

    tokens    of the packed rows, padding included
    seconds   of the step, the images encoded in it
    MiB       of resident memory, at its highest, above what the process had before the step
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.setting import write_model

SAMPLES = 8
TEXTS = ("What is the sum of all digits in the picture?", "<think> 3 + 7 = 10 </think> \\boxed{10}")
PROMPTS = {"quickstart": 32, "megapixel": 2}
SIZES = {"quickstart": (84, 56), "megapixel": (1148, 896)}
MODELS = {
    "quickstart": {"hidden": 128, "layers": 4, "feed_forward": 384, "heads": 1},
    "megapixel": {"hidden": 512, "layers": 4, "feed_forward": 1408, "heads": 4},
}


def made_sequences(mix: str, processor: Any, num_prompts: int) -> list[Any]:
    """Both passes of every sample."""
    from megatron_sr1.types import TokenSequence

    draw = random.Random(0)

    def text(count: int) -> list[int]:
        return [draw.randrange(100) for _ in range(count)]

    def length(median: int, sigma: float) -> int:
        if mix == "quickstart":
            return draw.randint(10, 50)
        return min(2048, max(1, round(median * draw.lognormvariate(0.0, sigma))))

    sequences = []
    for group in range(num_prompts):
        width, height = SIZES[mix]
        pixels = np.random.default_rng(group).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = processor.encode_image(Image.fromarray(pixels))
        shown = processor.expand(processor.prompt_ids("", 1), [image.grid_thw])
        asked = [*shown, *text(60 if mix == "quickstart" else 170)]
        for _ in range(SAMPLES):
            response = length(380, 0.55)
            sequences.append(TokenSequence(asked, text(response), (image,), 2 * group))
            read = text(40 if mix == "quickstart" else 125 + int(0.4 * response))
            sequences.append(TokenSequence(read, text(length(240, 0.6)), (), 2 * group + 1))
    return sequences


def measure(mix: str, folder: str, share: bool, num_prompts: int) -> dict[str, float]:
    """One step."""
    from megatron_sr1.config import load_config
    from megatron_sr1.config.pixels import PixelLimits
    from megatron_sr1.packing import pack
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.policy import Policy
    from megatron_sr1.processor import Processor
    from megatron_sr1.types import LogProbs, Scoring

    options = [f"model.hf_dir={folder}", "nproc=1", "model.max_position=4096", "train.micro_batch_tokens=16384"]
    config = load_config(None, options)
    policy = Policy(config, platform, num_optimizer_steps=1, keep_reference=False)
    processor = Processor.from_pretrained(folder, pixels=PixelLimits(784, 2**20))
    sequences = made_sequences(mix, processor, num_prompts)
    for sequence in sequences:
        for image in sequence.images:
            image.patches()  # made before, as a run makes them ahead
    batches = pack(
        sequences,
        max_tokens=16384,
        row_multiple=1,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
        share_prefix=share,
    )
    scored = sum(len(sequence.response_ids) for sequence in sequences)

    def loss(index: int, logprobs: LogProbs) -> Any:
        mean = -logprobs.logprobs.sum() / scored
        return mean, {"loss": mean}

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = policy.train_step(batches, loss, Scoring())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = sum(len(batch.input_ids) for batch in batches)
    return {"tokens": tokens, "seconds": seconds, "MiB": (peak - before) / 1024, "norm": result.grad_norm}


def _measured(mix: str, folder: Path, share: bool, num_prompts: int) -> dict[str, float]:
    arguments = [mix, str(folder), str(int(share)), str(num_prompts)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.shared_prefix", "--measure", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixes", nargs="+", choices=list(PROMPTS), default=list(PROMPTS))
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        mix, folder, share, num_prompts = args.measure
        print(json.dumps(measure(mix, folder, bool(int(share)), int(num_prompts))))
        return
    for mix in args.mixes:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            write_model(model, TEXTS, **MODELS[mix], vocab=2048)
            runs = {True: [], False: []}  # type: dict[bool, list[dict[str, float]]]
            for _ in range(args.rounds):
                for share, found in runs.items():
                    found.append(_measured(mix, model, share, PROMPTS[mix]))
        best = {share: {key: min(run[key] for run in found) for key in found[0]} for share, found in runs.items()}
        for share, name in ((False, "whole"), (True, "shared")):
            print(f"{mix:<10} {name:<6}", "  ".join(f"{value:12.4f} {key}" for key, value in best[share].items()))
        ratios = "  ".join(f"{best[False][key] / best[True][key]:11.3f}x {key}" for key in best[True])
        print(f"{mix:<10} ratio ", ratios, flush=True)


if __name__ == "__main__":
    main()
