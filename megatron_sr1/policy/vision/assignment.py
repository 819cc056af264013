"""Who encodes what: images to ranks, longest first; the longest are cut in pieces where that is faster.

Lengths are in patches of an image in the order in which the tower keeps them (`patches.PatchOrder`), which says too
where that order may be cut. No tensor and no process group here: every rank computes the same plan from the grids.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, order=True)
class ImagePiece:
    """Patches [start, stop) of image number `image`."""

    image: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SplitCosts:
    """What full attention over pieces of other ranks costs in each layer, in units of the time that one patch takes in
    the whole tower, forward and backward.

    Derived for H100s in one node, Qwen2.5-VL's tower (1280 channels, 32 layers) in bf16: a patch takes 3 * 1.3 GFLOP,
    about 10 us at 400 TFLOP/s. A layer's all-gather and reduce-scatter start in 60 us together, and move 5 kB of keys
    and values a patch there and back, 35 ns at 300 GB/s. Qwen3-VL's tower (1152 channels, 24 or 27 layers) gives nearly
    the same.
    """

    per_collective: float = 6.0
    per_patch: float = 0.004

    def of(self, plan: VisionPlan, attention_layers: int) -> float:
        """Time of `plan`, in patches: its busiest rank's, and the exchange in `attention_layers` layers."""
        exchange = self.per_collective + self.per_patch * plan.num_shared_patches if plan.shared_images else 0.0
        return max(plan.patches) + attention_layers * exchange


@dataclass(frozen=True)
class VisionPlan:
    """The pieces of each rank. A rank's pieces of shared images come first; over the ranks, in their order, these are
    the shared images' patches, in order."""

    parts: tuple[tuple[ImagePiece, ...], ...]
    shared_images: frozenset[int]  # those that several ranks hold a piece of

    @cached_property
    def patches(self) -> tuple[int, ...]:
        """Of each rank."""
        return tuple(sum(len(piece) for piece in part) for part in self.parts)

    @cached_property
    def shared_patches(self) -> tuple[int, ...]:
        """Of each rank, those of shared images: the first rows of its part."""
        return tuple(sum(len(p) for p in part if p.image in self.shared_images) for part in self.parts)

    @property
    def num_shared_patches(self) -> int:
        return sum(self.shared_patches)


def plan_images(
    cuts: Sequence[Sequence[int]], num_ranks: int, *, attention_layers: int, costs: SplitCosts | None = None
) -> VisionPlan:
    """The cheapest plan, by `costs`, of those that split the k longest images, k = 0, 1, ..., and no other.

    Whole images go to the least busy rank, longest first (Graham 1969: the busiest rank has at most 4/3 - 1/(3m) of
    what is best for m ranks). The split ones then fill the ranks up to one level, as near as their cuts allow.

    Args:
        cuts: of each image, ascending: 0, where it may be cut, its number of patches.
        num_ranks: that share the work.
        attention_layers: how many layers attend over whole images, and so exchange keys and values of split ones.
        costs: of that exchange; an H100 node's by default.
    """
    costs = costs or SplitCosts()
    longest_first = sorted(range(len(cuts)), key=lambda image: (-cuts[image][-1], image))
    mean = sum(image[-1] for image in cuts) / num_ranks
    best = _split(cuts, longest_first, 0, num_ranks)
    best_cost = costs.of(best, attention_layers)
    for num_split in range(1, len(cuts) + 1 if num_ranks > 1 else 1):
        plan = _split(cuts, longest_first, num_split, num_ranks)
        cost = costs.of(plan, attention_layers)
        if cost < best_cost:
            best, best_cost = plan, cost
        if mean + cost - max(plan.patches) >= best_cost:  # more exchange would not pay even with equal ranks
            break
    return best


def _split(cuts: Sequence[Sequence[int]], longest_first: Sequence[int], num_split: int, num_ranks: int) -> VisionPlan:
    """The plan that splits the first `num_split` of `longest_first`."""
    ranks = [(0, rank) for rank in range(num_ranks)]  # (patches, rank): a heap
    parts: list[list[ImagePiece]] = [[] for _ in range(num_ranks)]
    for image in longest_first[num_split:]:
        patches, rank = ranks[0]
        parts[rank].append(ImagePiece(image, 0, cuts[image][-1]))
        heapq.heapreplace(ranks, (patches + cuts[image][-1], rank))
    loads = [patches for patches, _ in sorted(ranks, key=lambda entry: entry[1])]
    split = sorted(longest_first[:num_split])
    for rank, pieces in enumerate(_fill(cuts, split, loads)):
        parts[rank] += pieces
    holders = Counter(piece.image for part in parts for piece in part)
    shared = frozenset(image for image in split if holders[image] > 1)
    return VisionPlan(
        tuple(tuple(sorted(part, key=lambda piece: (piece.image not in shared, piece))) for part in parts), shared
    )


def _fill(cuts: Sequence[Sequence[int]], images: Sequence[int], loads: Sequence[int]) -> list[list[ImagePiece]]:
    """Pieces of `images`, one after the other, for ranks that hold `loads` patches already."""
    pieces: list[list[ImagePiece]] = [[] for _ in loads]
    if not images:
        return pieces
    offsets = [0]
    for image in images:
        offsets.append(offsets[-1] + cuts[image][-1])
    level = _level(loads, offsets[-1])
    place, index, target = 0, 0, 0.0  # where the next piece starts: in patches of images[index], and over all
    for rank, load in enumerate(loads):
        target += max(0.0, level - load)
        last_rank = rank == len(loads) - 1
        while index < len(images):
            image = images[index]
            stop = cuts[image][-1] if last_rank else max(place, _nearest(cuts[image], target - offsets[index]))
            if stop > place:
                pieces[rank].append(ImagePiece(image, place, stop))
            place = stop
            if stop < cuts[image][-1]:
                break
            place, index = 0, index + 1
    return pieces


def _level(loads: Sequence[int], patches: int) -> float:
    """The level t to which `patches` fill the loads: sum of max(0, t - load) = patches."""
    ascending = sorted(loads)
    below = 0
    for count, load in enumerate(ascending, start=1):
        below += load
        level = (below + patches) / count
        if count == len(ascending) or level <= ascending[count]:
            break
    return level


def _nearest(cuts: Sequence[int], target: float) -> int:
    after = min(bisect_left(cuts, target), len(cuts) - 1)
    before = max(after - 1, 0)
    return cuts[before] if target - cuts[before] < cuts[after] - target else cuts[after]
