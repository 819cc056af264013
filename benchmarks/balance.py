"""How evenly an optimizer step's responses are shared among data-parallel replicas.

    python -m benchmarks.balance --prompts 128 --replicas 1 4 16 32 64 128 256

On the mix of `benchmarks.packing` (two passes of 8 samples). For each number of replicas:

    whole       tokens of the fullest replica over the mean where groups of siblings stay whole
    cut         the same as they are trained: groups cut where that is needed (packing.split_groups)
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
from megatron_sr1.packing.bins import sequence_length


@dataclass(frozen=True)
class Balance:
    """Of one number of replicas."""

    whole: float
    cut: float
    on: float
    encoded: float
    plan_ms: float


def mixed_groups(num_prompts: int, seed: int) -> list[list[tuple[int, bool]]]:
    """(tokens, whether it has an image) of the sequences of each group."""
    groups: list[list[tuple[int, bool]]] = []
    image: object = None
    for sequence in length_mix(num_prompts, seed):
        if sequence.images and sequence.images[0] is not image:
            image = sequence.images[0]
            groups.append([])
        groups[-1].append((sequence_length(sequence), bool(sequence.images)))
    return groups


def measure(groups: Sequence[Sequence[tuple[int, bool]]], replicas: int) -> Balance:
    groups = [sorted(group, key=lambda each: not each[1]) for group in groups]  # those that see come first
    lengths = [[tokens for tokens, _ in group] for group in groups]
    kinds = [[[tokens for tokens, sees in group if sees is kind] for kind in (True, False)] for group in groups]
    families = [Family(*kind) for kind in kinds]
    mean = sum(map(sum, lengths)) / replicas
    whole = split_for_ranks([sum(group) for group in lengths], replicas)
    start = time.perf_counter()
    ranks = split_groups(families, replicas)
    plan_ms = 1e3 * (time.perf_counter() - start)
    encoders = sum(len({group for group, number in rank if groups[group][number][1]}) for rank in ranks)
    holders = sum(len({group for group, _ in rank}) for rank in ranks)
    return Balance(
        whole=max(sum(sum(lengths[group]) for group in rank) for rank in whole) / mean,
        cut=max(sum(lengths[group][number] for group, number in rank) for rank in ranks) / mean,
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
    print(f"{args.prompts} prompts, {sum(map(len, groups))} sequences, {sum(t for g in groups for t, _ in g):,} tokens")
    print(f"{'replicas':>8} {'whole':>8} {'cut':>8} {'on':>8} {'encoded':>8} {'plan ms':>8}")
    for replicas in args.replicas:
        found = measure(groups, replicas)
        figures = " ".join(f"{value:8.3f}" for value in (found.whole, found.cut, found.on, found.encoded))
        print(f"{replicas:8} {figures} {found.plan_ms:8.1f}")


if __name__ == "__main__":
    main()
