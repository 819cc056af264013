"""The engine's life on this device: new weights reach old images, it sleeps and wakes whole, gives its memory back,
starts again in the same process, and decodes from CUDA graphs what it decodes without them.

Each engine has a process of its own: `python -m benchmarks.gpu_check.canary MODEL OUT graphs|eager`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_check.policies import TEXTS, made_model, size_here
from benchmarks.gpu_check.private import REPOSITORY
from benchmarks.gpu_check.report import Figure, Report

if TYPE_CHECKING:
    from megatron_sr1.processor import Processor
    from megatron_sr1.rollout import Engine

GIB = 2**30
NUM_REQUESTS, NUM_TOKENS = 9, 48  # not a size that a graph is captured for, so the graphs pad
MAX_GRAPH_GAP = 0.03  # nats, mean: padded products may be other kernels, whose bf16 logits round otherwise
_SIDE = 56  # pixels of an image

Lived = dict[str, Any]


def run(folder: Path) -> Report:
    """Figures of both engines. Wrong: memory that sleep did not give back, other answers after waking or a restart, or
    from graphs; what the canary itself refuses ends the process of its engine."""
    model = made_model(folder.parent, size_here())
    kinds = ("graphs", "eager") if torch.cuda.is_available() else ("eager",)
    lives = {kind: _live_in_process(model, folder / f"{kind}.json", kind) for kind in kinds}
    figures: dict[str, Figure] = {}
    wrong = []
    for kind, life in lives.items():
        figures |= {f"{kind}: {name}": value for name, value in life.items() if name != "answers"}
        wrong += faults(kind, life)
    if len(lives) == 2:
        gap, largest, differing = distance(lives["graphs"]["answers"], lives["eager"]["answers"])
        figures |= {"graphs against eager: mean gap, nats": gap, "bound of it": MAX_GRAPH_GAP}
        figures |= {"largest gap, nats": largest, "greedy answers that part": differing}
        figures["speed-up of decoding by graphs"] = lives["eager"]["ms a step"] / lives["graphs"]["ms a step"]
        if gap > MAX_GRAPH_GAP:
            wrong.append(f"log-probs from graphs are {gap:.3g} nats from those without")
    else:
        figures["graphs"] = "absent: no CUDA device"
    return Report(figures, wrong=wrong)


def faults(kind: str, life: Lived) -> list[str]:
    """What is wrong with one engine."""
    wrong = []
    asleep = life["GiB given back by sleep"]
    if asleep is not None and asleep < life["GiB of KV cache"]:
        wrong.append(f"{kind}: asleep the engine gave back {asleep:.2f} GiB, less than its KV cache")
    for when in ("woken", "restarted"):
        if not life[f"same answers when {when}"]:
            wrong.append(f"{kind}: the {when} engine answers otherwise with the same weights")
    return wrong


def distance(ours: list[Any], others: list[Any]) -> tuple[float, float, int]:
    """Mean and largest difference of log-probs up to where two answers part, and how many part."""
    gaps, differing = [0.0], 0
    for (ids, logprobs), (other_ids, other_logprobs) in zip(ours, others, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ids, other_ids, strict=False)) if a != b), len(ids))
        differing += same < len(ids)
        gaps += [abs(a - b) for a, b in zip(logprobs[:same], other_logprobs[:same], strict=True)]
    return sum(gaps) / max(1, len(gaps) - 1), max(gaps), differing


def _live_in_process(model: Path, out: Path, kind: str) -> Lived:
    subprocess.run([sys.executable, "-m", __spec__.name, str(model), str(out), kind], cwd=REPOSITORY, check=True)
    return json.loads(out.read_text())


def _live(model: str, graphs: bool) -> Lived:
    """Starts an engine beside a scorer and makes it do everything."""
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.config import load_config
    from megatron_sr1.policy import Scorer
    from megatron_sr1.processor import Processor
    from megatron_sr1.rollout import Engine, EngineLimits, stale_vision_canary

    dtype = "fp32" if platform.on_cpu else "bf16"
    scorer = Scorer(load_config(None, [f"model.hf_dir={model}", f"precision.dtype={dtype}"]), platform)
    processor = Processor.from_pretrained(model)
    kv_gib = 0.25 if platform.on_cpu else 2.0
    limits = EngineLimits(512, 16, kv_cache_gib=kv_gib, max_images=1, seed=0, cuda_graphs=graphs)
    life: Lived = {"GiB of KV cache": kv_gib}
    with _timed(life, "seconds to start"):
        engine = Engine(model, limits, checksum_every=1, sleeps=True)
    engine.update_weights(scorer.hf_weights(), 1)
    stale_vision_canary(engine, processor, _image(), scorer.hf_weights)
    life["answers"], life["ms a step"] = _answers(engine, processor)
    with _given_back(life, platform.on_cpu):
        engine.sleep()
    with _timed(life, "seconds to wake, weights included"):
        engine.update_weights(scorer.hf_weights(), 2)
    life["same answers when woken"] = _answers(engine, processor)[0] == life["answers"]
    with _timed(life, "seconds to restart"):
        engine.restart()
    engine.update_weights(scorer.hf_weights(), 3)
    life["same answers when restarted"] = _answers(engine, processor)[0] == life["answers"]
    return life


@contextmanager
def _timed(life: Lived, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    life[name] = round(time.perf_counter() - start, 2)


@contextmanager
def _given_back(life: Lived, on_cpu: bool) -> Iterator[None]:
    """How much more of the card's memory is free afterwards; None on a CPU, whose engines do not sleep."""
    free: Callable[[], int] = (lambda: 0) if on_cpu else (lambda: torch.cuda.mem_get_info()[0])
    before = free()
    yield
    life["GiB given back by sleep"] = None if on_cpu else (free() - before) / GIB


def _image() -> Any:
    from PIL import Image

    pixels = torch.randint(0, 256, (_SIDE, _SIDE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def _answers(engine: Engine, processor: Processor) -> tuple[list[Any], float]:
    """Greedy answers, some with an image, as (ids, log-probs) in the order of the requests; milliseconds a step."""
    from megatron_sr1.rollout.request import Draw

    for number in range(NUM_REQUESTS):
        images = [processor.encode_image(_image())] if number % 2 else []
        ids = processor.prompt_ids(f"{TEXTS[0]} {number}", len(images))
        prepared = engine.prepare(processor.expand(ids, [image.grid_thw for image in images]), images)
        draw = Draw(0.0, NUM_TOKENS, 0, processor.end_of_turn_id, processor.media_ids)
        engine.add(f"{number}", prepared, draw)
    found, start, steps = {}, time.perf_counter(), 0
    while engine.has_unfinished():
        steps += 1
        for generation in engine.step():
            found[int(generation.request_id)] = (list(generation.response_ids), list(generation.logprobs))
    return [list(found[number]) for number in range(NUM_REQUESTS)], 1e3 * (time.perf_counter() - start) / steps


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_live(sys.argv[1], sys.argv[3] == "graphs")))
