"""How evenly an optimizer step's responses are shared among data-parallel replicas.

    python -m benchmarks.balance --prompts 128 --replicas 1 4 16 32 64 128 256

On the mix of `benchmarks.packing` (two passes of 8 samples). For each number of replicas:

    whole       tokens of the fullest replica over the mean where groups of siblings stay whole
    cut         the same as they are trained: groups cut where that is needed (packing.split_groups)
    longest     tokens of the longest sequence over the mean: the fullest replica has no less
    repeated    tokens of all replicas over each prompt once: it is on all that train some of its samples
    on          replicas that a group is on, in the mean
    encoded     how often an image is encoded for training, over once
    plan ms     to deal them out, on this machine
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.packing import length_mix
from megatron_sr1.packing import Family, split_for_ranks, split_groups


@dataclass(frozen=True)
class Balance:
    """Of one number of replicas."""

    whole: float
    cut: float
    longest: float
    repeated: float
    on: float
    encoded: float
    plan_ms: float


def mixed_groups(num_prompts: int, seed: int) -> list[Family]:
    """The tokens of each group, whose prompt its samples share."""
    groups: list[tuple[int, list[int], list[int]]] = []
    image: object = None
    for sequence in length_mix(num_prompts, seed):
        prompt = len(sequence.prompt_ids)
        if sequence.images and sequence.images[0] is not image:
            image = sequence.images[0]
            groups.append((prompt, [], []))
        if sequence.images:
            groups[-1][1].append(len(sequence.response_ids))
        else:
            groups[-1][2].append(prompt + len(sequence.response_ids))
    return [Family(seeing, blind, prompt) for prompt, seeing, blind in groups]


def load(groups: Sequence[Family], rank: Sequence[tuple[int, int]]) -> int:
    """Tokens of a rank, each prompt once."""
    seen = {group for group, number in rank if number < len(groups[group].seeing)}
    own = sum([*groups[group].seeing, *groups[group].blind][number] for group, number in rank)
    return own + sum(groups[group].prompt for group in seen)


def measure(groups: Sequence[Family], replicas: int) -> Balance:
    sizes = [group.prompt + sum(group.seeing) + sum(group.blind) for group in groups]
    whole = split_for_ranks(sizes, replicas)
    start = time.perf_counter()
    ranks = split_groups(groups, replicas)
    plan_ms = 1e3 * (time.perf_counter() - start)
    loads = [load(groups, rank) for rank in ranks]
    encoders = sum(len({group for group, number in rank if number < len(groups[group].seeing)}) for rank in ranks)
    holders = sum(len({group for group, _ in rank}) for rank in ranks)
    return Balance(
        whole=max(sum(sizes[group] for group in rank) for rank in whole) * replicas / sum(sizes),
        cut=max(loads) * replicas / sum(loads),
        longest=max(group.longest for group in groups) * replicas / sum(loads),
        repeated=sum(loads) / sum(sizes),
        on=holders / len(groups),
        encoded=encoders / len(groups),
        plan_ms=plan_ms,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128, help="of an optimizer step")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    groups = mixed_groups(args.prompts, args.seed)
    sequences = sum(len(group.seeing) + len(group.blind) for group in groups)
    tokens = sum(group.prompt + sum(group.seeing) + sum(group.blind) for group in groups)
    print(f"{args.prompts} prompts, {sequences} sequences, {tokens:,} tokens, each prompt once")
    names = ("replicas", "whole", "cut", "longest", "repeated", "on", "encoded", "plan ms")
    print(" ".join(f"{name:>8}" for name in names))
    for replicas in args.replicas:
        found = measure(groups, replicas)
        print(f"{replicas:8}", " ".join(f"{value:8.3f}" for value in vars(found).values()))


if __name__ == "__main__":
    main()
