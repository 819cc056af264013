"""What the second pass costs: first pass only, barrier, streamed, on the same requests, by vLLM on the CPU.

    python -m benchmarks.two_pass --mixes pareto straggler uniform equal --repeats 3

Requests are seeded and their lengths given, so every variant draws the same tokens (checked). Each line is one variant
of one mix of first-pass lengths; the second pass always has --second tokens. `streamed, in turn` serves requests in the
order they come, without priorities.

    seconds      of the best repeat, the variants taking turns; cpu: of this process, which other work disturbs less
    over first   seconds, cpu seconds and forward passes, relative to the first pass alone
    idle         share of the engine's slots that had no request, over all forward passes
                 (on a CPU a forward pass costs nearly in proportion to its tokens, and the second pass is a third more
                 of them; on an accelerator, which reads all weights for any number of tokens, the passes count)
    hidden       share of the second-pass tokens drawn before the last first pass ended, taking each request's tokens
                 as even over its time
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.setting import write_model
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import CAPTION_REASONER, SEE_THINK
from megatron_sr1.rollout import Engine, EngineLimits, Limits, Planner, TwoPassGenerator
from megatron_sr1.rollout.request import Draw, Generation
from megatron_sr1.types import SECOND, Prompt, PromptShare, Rollout, RolloutGroup, Sampling

TEXTS = (  # what the tokenizer learns: prompts of both passes, so that they are no longer than with a real one
    SEE_THINK.user_text("What is 3 plus 4?"),
    CAPTION_REASONER.user_text("What is 3 plus 4?", 0, "a 3 and a 7"),
    "<description> a 3 and a 7 </description> <think> 3 + 7 = 10 </think> \\boxed{10}",
)
MAX_MODEL_TOKENS = 1024
VARIANTS = ("first pass only", "barrier", "streamed, in turn", "streamed")
VOCAB = 704  # a row for every token of the small tokenizer
MIXES = ("pareto", "straggler", "uniform", "equal")


def first_lengths(mix: str, num: int, longest: int) -> list[int]:
    """Tokens of each first pass."""
    random = np.random.default_rng(0)
    drawn = {
        "pareto": 40 * (1 + random.pareto(1.2, num)),
        "straggler": np.where(np.arange(num) == num // 2, longest, 60),
        "uniform": random.uniform(20, longest / 2, num),
        "equal": np.full(num, longest / 4),
    }[mix]
    return [int(length) for length in np.minimum(drawn, longest)]


class MeasuredEngine(Engine):
    """Every response has the length it is given; forward passes and occupied slots are counted."""

    lengths: dict[str, int]  # request id -> tokens
    slots = 1
    in_turn = False

    def begin(self, lengths: dict[str, int], in_turn: bool) -> None:
        self._engine.reset_prefix_cache()
        self.lengths, self.in_turn = lengths, in_turn
        self.num_steps = self.occupied = self.open = 0

    def add(self, request_id: str, prepared: Any, draw: Draw) -> None:
        banned = (*draw.banned_ids, draw.end_of_turn_id)
        priority = 0 if self.in_turn else draw.priority
        changed = replace(draw, max_tokens=self.lengths[request_id], banned_ids=banned, priority=priority)
        super().add(request_id, prepared, changed)
        self.open += 1

    def step(self) -> list[Generation]:
        self.num_steps += 1
        self.occupied += min(self.open, self.slots)
        finished = [replace(generation, finish_reason="stop") for generation in super().step()]
        self.open -= len(finished)
        return finished


class DescribingProcessor(Processor):
    """Random weights never describe anything, so every response is read as a description."""

    def decode(self, ids: Sequence[int]) -> str:
        return "<description>" + super().decode(ids).replace("<", "") + " .</description>"


@dataclass(frozen=True)
class Result:
    """One run of one variant."""

    seconds: float
    cpu: float
    steps: int
    idle: float
    tokens: int
    hidden: float
    groups: list[RolloutGroup]


def run(
    engine: MeasuredEngine,
    processor: Processor,
    prompts: list[Prompt],
    variant: str,
    mix: str,
    options: argparse.Namespace,
) -> Result:
    lengths = first_lengths(mix, options.requests, options.longest)
    places = [(group, sample) for group in range(len(prompts)) for sample in range(options.samples)]
    asked = {f"{group}/{sample}/first": tokens for (group, sample), tokens in zip(places, lengths, strict=True)}
    asked |= {f"{group}/{sample}/second": options.second for group, sample in places}
    later = () if variant == "first pass only" else (SECOND,)
    planner = Planner(processor, Limits(options.longest, MAX_MODEL_TOKENS, 32))
    generator = TwoPassGenerator(engine, planner, streamed=variant != "barrier")
    sampling = Sampling(options.samples, 1.0, options.longest, seed=1, later=later)
    engine.begin(asked, in_turn=variant == "streamed, in turn")
    start, start_cpu = time.perf_counter(), time.process_time()
    groups = generator.generate(PromptShare.whole(prompts), sampling, 0)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    firsts = [pair.first for group in groups for pair in group.pairs]
    seconds_passes = [pair.second for group in groups for pair in group.pairs if pair.second is not None]
    tokens = sum(len(rollout.response_ids) for rollout in firsts + seconds_passes)
    idle = 1 - engine.occupied / (engine.num_steps * engine.slots)
    return Result(seconds, cpu, engine.num_steps, idle, tokens, _hidden(firsts, seconds_passes), groups)


def _hidden(firsts: list[Rollout], seconds: list[Rollout]) -> float:
    end = max(rollout.finished_at for rollout in firsts)
    before = [
        min(1.0, max(0.0, (end - rollout.queued_at) / (rollout.finished_at - rollout.queued_at))) for rollout in seconds
    ]
    return sum(before) / len(before) if before else 0.0


def ids(groups: list[RolloutGroup], second: bool) -> list[Any]:
    pairs = [pair for group in groups for pair in group.pairs]
    return [pair.second.response_ids if second else pair.first.response_ids for pair in pairs]


def compare(
    engine: MeasuredEngine, processor: Processor, prompts: list[Prompt], mix: str, options: argparse.Namespace
) -> None:
    best: dict[str, Result] = {}
    for _ in range(options.repeats):
        for variant in VARIANTS:
            result = run(engine, processor, prompts, variant, mix, options)
            known = best.get(variant, result)
            times = {"seconds": min(result.seconds, known.seconds), "cpu": min(result.cpu, known.cpu)}
            best[variant] = replace(known, **times)
    first = best[VARIANTS[0]]
    for variant, result in best.items():
        assert ids(result.groups, False) == ids(first.groups, False), "first passes differ"
        if variant != VARIANTS[0]:
            assert ids(result.groups, True) == ids(best["barrier"].groups, True), "second passes differ"
        over = [100 * (a / b - 1) for a, b in ((result.seconds, first.seconds), (result.cpu, first.cpu))]
        steps = 100 * (result.steps / first.steps - 1)
        print(
            f"{mix:10} {variant:18} {result.seconds:7.2f} s  cpu {result.cpu:7.2f} s  {result.steps:5} passes  "
            f"over first {over[0]:+6.1f} % {over[1]:+6.1f} % {steps:+6.1f} %  "
            f"{result.tokens / result.seconds:6.0f} tok/s  "
            f"idle {100 * result.idle:3.0f} %  hidden {100 * result.hidden:3.0f} %",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="per prompt; divides the requests")
    parser.add_argument("--slots", type=int, default=32, help="requests that run at once")
    parser.add_argument("--longest", type=int, default=400, help="tokens of a first pass, at most")
    parser.add_argument("--second", type=int, default=40, help="tokens of each second pass")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--hidden", type=int, default=128, help="channels of the model; a multiple of 128")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    define_missing_torchvision_ops()
    random = np.random.default_rng(0)
    prompts = [
        Prompt(f"p{i}", f"What is {i} plus 3?", "0", (Image.fromarray(random.integers(0, 255, (28, 84, 3), np.uint8)),))
        for i in range(options.requests // options.samples)
    ]
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden": options.hidden, "feed_forward": 4 * options.hidden, "heads": options.hidden // 128}
        write_model(Path(folder), TEXTS * 20, layers=options.layers, vocab=VOCAB, **shape)
        engine = MeasuredEngine(
            folder, EngineLimits(MAX_MODEL_TOKENS, options.slots, kv_cache_gib=0.25, max_images=1, seed=0)
        )
        engine.slots = options.slots
        processor = DescribingProcessor.from_pretrained(folder)
        run(engine, processor, prompts, "streamed", options.mixes[0], options)  # warms up
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} thread here")
        for mix in options.mixes:
            compare(engine, processor, prompts, mix, options)
        print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
