"""One rank's rows of the tower: which attend to which.

Two orders of the same T rows. Piece order: piece after piece, as planned; whole images are in one run there. Kept
order: the windows of all pieces sorted by length, so that windows of one length are one view [windows, length] without
a copy. A tower without windows has one order. The 2 x 2 patches of a visual token are neighbours in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sr1.policy.vision.assignment import VisionPlan
from megatron_sr1.policy.vision.patches import PatchOrder


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) in piece order attend to [key_start, key_stop): of the rows that all ranks share, or of the
    rank's own in piece order."""

    start: int
    stop: int
    key_start: int
    key_stop: int
    shared: bool


@dataclass(frozen=True)
class WindowOrder:
    """Between the two orders, and the windows of the kept one."""

    kept: Tensor  # [T] int64: the piece-order row of each kept row
    pieces: Tensor  # [T] int64: the kept row of each piece-order row
    groups: tuple[tuple[int, int], ...]  # (windows, rows of each), one after the other in kept order


@dataclass(frozen=True)
class RankRows:
    """What one rank computes."""

    segments: tuple[Segment, ...]
    shared_sizes: tuple[int, ...]  # rows of shared images on each rank: the first ones in piece order; () if none
    windows: WindowOrder | None


def rank_rows(plan: VisionPlan, rank: int, orders: Sequence[PatchOrder], *, windows: bool) -> RankRows:
    """The rows of `rank`.

    Args:
        plan: of all ranks.
        rank: whose rows.
        orders: of each image.
        windows: whether the tower has them.
    """
    key_starts, num_shared = {}, 0
    for image in sorted(plan.shared_images):
        key_starts[image] = num_shared
        num_shared += orders[image].cuts[-1]
    segments, start = [], 0
    for piece in plan.parts[rank]:
        stop, shared = start + len(piece), piece.image in plan.shared_images
        key_start = key_starts[piece.image] if shared else start
        segments.append(Segment(start, stop, key_start, key_start + orders[piece.image].cuts[-1], shared))
        start = stop
    return RankRows(
        tuple(segments),
        plan.shared_patches if plan.shared_images else (),
        _window_order(plan, rank, orders) if windows else None,
    )


def _window_order(plan: VisionPlan, rank: int, orders: Sequence[PatchOrder]) -> WindowOrder:
    lengths = [torch.zeros(0, dtype=torch.int64)]
    for piece in plan.parts[rank]:
        cuts = torch.tensor(orders[piece.image].cuts)
        lengths.append(torch.diff(cuts[(cuts >= piece.start) & (cuts <= piece.stop)]))
    length = torch.cat(lengths)
    start = length.cumsum(0) - length
    by_length = torch.argsort(length, stable=True)
    length, start = length[by_length], start[by_length]
    total = int(length.sum())
    kept_start = length.cumsum(0) - length
    kept = torch.repeat_interleave(start - kept_start, length) + torch.arange(total)
    sizes, counts = torch.unique_consecutive(length, return_counts=True)
    groups = tuple(zip(counts.tolist(), sizes.tolist(), strict=True))
    return WindowOrder(kept, torch.argsort(kept), groups)
