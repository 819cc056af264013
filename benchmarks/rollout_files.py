"""What keeping a step's rollouts costs it: the files of one engine, written beside the training and read again.

    python -m benchmarks.rollout_files --pairs 4096

Pairs are of two passes: a prompt of --visual image tokens and 100 others, responses of 500 and 300 tokens, all ids and
log-probs drawn. Columns, in seconds:

    handed over   what `take` is held up by
    beside        until the files are there, with nothing else to do
    training      a loop of Python and of products of matrices, by itself
    with it       the same loop while the files are written
    waited        what is left to wait for at the loop's end
    in place      what earlier releases did, on one rank for all engines: dataclasses.asdict and json, not compressed
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megatron_sr1.ranks import ALONE
from megatron_sr1.streams import PRESETS
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_files import rollouts_file, step_files
from megatron_sr1.training.rollout_reader import read_rollouts
from megatron_sr1.training.rollout_writer import RolloutWriter
from megatron_sr1.training.step_rewards import all_rewards
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair

SAMPLES, OTHERS, FIRST, SECOND = 8, 100, 500, 300  # samples of a prompt; tokens
VOCABULARY = 150_000
PRESET = PRESETS["vision_sr1"]


class Drawn:
    """`DrawnPrompts` of a list."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = prompts
        self.keys = [prompt.key for prompt in prompts]

    def read(self, number: int) -> Prompt:
        """The prompt."""
        return self._prompts[number]

    def images(self, number: int, sizes: Sequence[tuple[int, int]]) -> tuple[()]:
        """There are none."""
        return ()


def made_step(num_pairs: int, visual: int) -> StepRollouts:
    """Groups and rewards of a step."""
    draw = random.Random(0)
    groups = [_group(number, visual, draw) for number in range(num_pairs // SAMPLES)]
    names, places = all_rewards(PRESET), list(range(len(groups)))
    rewards = [{name: torch.rand(SAMPLES) for name in names} for _ in groups]
    # no segment is looked for: files do not tell of them
    recorder = Recorder(PRESET, SAMPLES, lambda response: torch.ones(2, len(response.rollout.response_ids)), VOCABULARY)
    ledger, _ = recorder.record(groups, rewards, ALONE)
    return StepRollouts(ledger, Drawn([group.prompt for group in groups]), places, groups, {})


def _group(number: int, visual: int, draw: random.Random) -> RolloutGroup:
    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCABULARY) for _ in range(count))

    def rollout(prompt: tuple[int, ...], count: int, name: str) -> Rollout:
        logprobs = tuple(-draw.random() for _ in range(count))
        return Rollout(name, prompt, ids(count), "word " * count, logprobs, "stop", 3, 0.5, 9.5)

    first = (*ids(OTHERS), *(VOCABULARY,) * visual)
    pairs = tuple(
        RolloutPair(
            k, rollout(first, FIRST, f"0/{number}/{k}/first"), rollout(ids(OTHERS), SECOND, "x"), "what it shows"
        )
        for k in range(SAMPLES)
    )
    return RolloutGroup(number, Prompt(f"sample-{number}", "What is it?", "7"), pairs)


def training(seconds: float) -> Callable[[], None]:
    """A loop that takes about so long by itself."""
    one = torch.randn(512, 512)

    def part() -> None:
        for _ in range(20):
            one @ one
        sum(number * number for number in range(20_000))

    part()
    start = time.perf_counter()
    for _ in range(20):
        part()
    count = max(1, round(seconds / ((time.perf_counter() - start) / 20)))

    def run() -> None:
        for _ in range(count):
            part()

    return run


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(rollouts: StepRollouts, engines: int, folder: Path) -> dict[str, float]:
    """Seconds, and MiB of the files, of the first of so many engines."""
    count, writer = len(rollouts.groups), RolloutWriter(PRESET.asked, PRESET.passes.later)
    ledger = replace(rollouts.ledger, holder=rollouts.ledger.number % engines)
    held = replace(rollouts, ledger=ledger, groups=rollouts.groups[::engines])

    def write(step: int) -> None:
        writer.write(rollouts_file(folder, step), held, count, rank=0)

    found = {"handed over": timed(lambda: write(0)), "beside": timed(writer.settle)}
    loop = training(1.5 * found["beside"] + 0.5)
    found["training"] = timed(loop)
    write(1)
    found["with it"] = timed(loop)
    found["waited"] = timed(writer.settle)
    writer.close()
    path = rollouts_file(folder, 1)
    parts = list(folder.glob("step_000001.0-of-*"))
    found["MiB"] = sum(file.stat().st_size for file in parts) / 2**20
    if engines == 1:
        assert step_files(path) == parts
        prompts = Drawn([group.prompt for group in rollouts.groups])
        found["read"] = timed(lambda: read_rollouts(path, lambda further: prompts, SAMPLES, ["acc"], PRESET.asked))
    return found


def _in_place(rollouts: StepRollouts, path: Path) -> None:
    with path.open("w") as file:
        for group in rollouts.groups:
            for pair in group.pairs:
                file.write(json.dumps({"first": asdict(pair.first), "second": asdict(pair.second)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4096, help="of a step, a multiple of 8")
    parser.add_argument("--visual", type=int, default=1000, help="tokens of an image")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rollouts = made_step(args.pairs, args.visual)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = timed(lambda: _in_place(rollouts, folder / "all.jsonl"))
        size = (folder / "all.jsonl").stat().st_size / 2**20
        print(f"{args.pairs} pairs; in place, by one rank: {before:.2f} s, {size:.0f} MiB")
        for engines in args.engines:
            found = measure(rollouts, engines, folder / str(engines))
            print(
                f"{engines:4} engines  " + "  ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True
            )


if __name__ == "__main__":
    main()
