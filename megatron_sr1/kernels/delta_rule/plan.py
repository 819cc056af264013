"""What a recurrence has to know of a packed row: where sequences start, and which of them go on from another's end.

A row is made of segments. A recurrent state and a convolution begin anew with each, except where a segment has a
parent, a prefix that several segments begin with: then the state is the one that the parent ends with, and the tokens
before the segment are the parent's last ones. Parents have no parents, so two levels of segments, one after the other,
are all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SegmentLevel:
    """Segments that can be computed side by side."""

    rows: Tensor | None  # [n] int64, of the row's tokens, segment after segment; None: all, in order
    lengths: tuple[int, ...]  # [N] tokens of each segment
    cu_seqlens: Tensor  # [N + 1] int64
    parents: Tensor | None  # [N] int64, among the segments of the level before; None: states begin with 0


@dataclass(frozen=True, eq=False)
class RowPlan:
    """A packed row of T tokens."""

    levels: tuple[SegmentLevel, ...]  # one, or that of prefixes and plain sequences, and that of what follows prefixes
    order: Tensor | None  # [T] int64: where each token is among those of all levels; None: with one level
    places: Tensor  # [T] int64: of each token in its segment
    segments: Tensor  # [T] int32: the segment of each token
    # of each distance from 1 on: the tokens that have one of a prefix so many places before them, and that one, int64
    bridges: tuple[tuple[Tensor, Tensor], ...]


def row_plan(cu_seqlens: Tensor, parents: Sequence[int], taps: int) -> RowPlan:
    """
    Args:
        cu_seqlens: [N + 1], of the segments of a row, none of which is empty.
        parents: [N], the segment that each goes on from, -1 for none. A parent has none itself.
        taps: of the convolution, the token itself among them.
    """
    device = cu_seqlens.device
    edges = cu_seqlens.tolist()
    assert len(edges) == len(parents) + 1 and all(parents[parent] < 0 for parent in parents if parent >= 0), parents
    roots = [number for number, parent in enumerate(parents) if parent < 0]
    children = [number for number, parent in enumerate(parents) if parent >= 0]
    levels = [_level(roots, edges, None, device, is_all=not children)]
    order = None
    if children:
        levels.append(_level(children, edges, [roots.index(parents[child]) for child in children], device))
        order = torch.argsort(torch.cat([level.rows for level in levels if level.rows is not None]))
    sizes = torch.tensor([stop - start for start, stop in pairwise(edges)], device=device)
    segments = torch.repeat_interleave(torch.arange(len(parents), device=device), sizes, output_size=edges[-1])
    places = torch.arange(edges[-1], device=device) - cu_seqlens[:-1].long()[segments]
    families = [(edges[child], edges[child + 1], *edges[parents[child] : parents[child] + 2]) for child in children]
    bridges = tuple(_bridges(families, distance, device) for distance in range(1, taps))
    return RowPlan(tuple(levels), order, places, segments.int(), bridges)


def _level(
    members: Sequence[int],
    edges: Sequence[int],
    parents: Sequence[int] | None,
    device: torch.device,
    *,
    is_all: bool = False,
) -> SegmentLevel:
    lengths = tuple(edges[number + 1] - edges[number] for number in members)
    rows = None
    if not is_all:
        rows = torch.cat([torch.arange(edges[number], edges[number + 1]) for number in members]).to(device)
    return SegmentLevel(
        rows,
        lengths,
        torch.tensor([0, *lengths]).cumsum(0).to(device),
        None if parents is None else torch.tensor(parents, device=device),
    )


def _bridges(
    families: Sequence[tuple[int, int, int, int]], distance: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`families`: first token and end of each segment with a parent, and the same of the parent."""
    pairs = [
        (token, source)
        for start, stop, first, end in families
        for token in range(start, min(stop, start + distance))
        if (source := end - distance + token - start) >= first
    ]
    rows, sources = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).to(device).unbind(1)
    return rows, sources
