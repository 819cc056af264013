"""Which tokens of a packed row attend to which, as calls of variable-length attention.

A row is made of segments. Under causal attention each token sees its own segment as far as itself and, where its
segment has a parent, the whole parent: [prompt | response 1 | ... | response K] are K sequences whose prompt is there
once (Prefix Grouper, arXiv 2506.05433, is the same for models of transformers). That is at most two calls, joined by
their log-sum-exp:

    own      all segments, each against itself
    parents  of each family all children, one run, against the parent

Under context parallelism a rank has two parts of each segment as queries (`context_index`), and the keys of all ranks
in the order of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

MAX_PADDING = 2.0  # of a padded batch of runs: its scores over those that are wanted
MAX_MASKED = 1 << 22  # scores of a batch that needs a mask
Run = tuple[int, int, int, int]  # [start, end) of the queries, [start, end) of the keys


@dataclass(frozen=True)
class PaddedRuns:
    """Some runs of a call side by side, each filled up to the longest. B runs, Q queries and K keys at most."""

    queries: Tensor  # [B, Q] int64, places among the queries of the call
    keys: Tensor  # [B, K] int64, places among its keys
    real: Tensor  # [B, Q] bool: not what fills up
    real_keys: Tensor  # [B, K] bool
    mask: Tensor | None  # [B, 1, Q, K] fp32, added to the scores; None: nothing, or what `causal` says
    causal: bool

    @cached_property
    def query_places(self) -> Tensor:
        """[B * Q] int64: where each is to be written among the queries of the call; -1 for what fills up."""
        return torch.where(self.real, self.queries, -1).flatten()

    @cached_property
    def key_places(self) -> Tensor:
        """[B * K] int64: the same of the keys."""
        return torch.where(self.real_keys, self.keys, -1).flatten()


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Runs of queries, each against a run of keys; no query is in two runs."""

    query_rows: Tensor | None  # [Nq] int64, of this rank's tokens, run after run; None: all, in order
    key_rows: Tensor | None  # [Nk] int64, of the row's tokens; None: all, in order
    cu_queries: Tensor  # [runs + 1] int32
    cu_keys: Tensor  # [runs + 1] int32
    lengths: tuple[tuple[int, int], ...]  # queries and keys of each run
    causal: bool  # the last query of a run sees all its keys, the one before it all but the last, and so on
    keys_once: bool  # no token of the row is in the keys of two runs

    @property
    def max_queries(self) -> int:
        return max(queries for queries, _ in self.lengths)

    @property
    def max_keys(self) -> int:
        return max(keys for _, keys in self.lengths)

    @cached_property
    def batches(self) -> tuple[PaddedRuns, ...]:
        """All runs, in as few padded batches as MAX_PADDING and MAX_MASKED allow: for attention that takes no runs."""
        starts = list(zip(self.cu_queries.tolist(), self.cu_keys.tolist(), strict=True))
        order = sorted(range(len(self.lengths)), key=lambda run: self.lengths[run][::-1], reverse=True)
        found: list[list[int]] = []
        shape = _Shape()
        for run in order:
            joined = shape.joined(*self.lengths[run], causal=self.causal)
            if found and joined.fits:
                found[-1].append(run)
                shape = joined
            else:
                found.append([run])
                shape = _Shape().joined(*self.lengths[run], causal=self.causal)
        return tuple(self._padded(runs, starts) for runs in found)

    def _needs_mask(self, runs: list[int]) -> bool:
        """What fills up queries is thrown away, and keys that do come behind what a causal query sees."""
        if self.causal:
            return any(self.lengths[run][0] != self.lengths[run][1] for run in runs)
        return len({self.lengths[run][1] for run in runs}) > 1

    def _padded(self, runs: list[int], starts: list[tuple[int, int]]) -> PaddedRuns:
        device = self.cu_queries.device
        first = torch.tensor([starts[run] for run in runs], device=device)  # [B, 2]
        length = torch.tensor([self.lengths[run] for run in runs], device=device)  # [B, 2]
        query = torch.arange(int(length[:, 0].max()), device=device)
        key = torch.arange(int(length[:, 1].max()), device=device)
        mask = None
        if needs_mask := self._needs_mask(runs):
            seen = (key < length[:, 1:])[:, None].expand(-1, len(query), -1)  # [B, Q, K]
            if self.causal:
                seen = seen & (key <= query[:, None] + (length[:, 1] - length[:, 0])[:, None, None])
            mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))[:, None]
        return PaddedRuns(
            queries=first[:, :1] + query.minimum(length[:, :1] - 1),
            keys=first[:, 1:] + key.minimum(length[:, 1:] - 1),
            real=query < length[:, :1],
            real_keys=key < length[:, 1:],
            mask=mask,
            causal=self.causal and not needs_mask,
        )


@dataclass(frozen=True)
class _Shape:
    """Of a padded batch that is being filled, so that a run more is no look at all runs."""

    num_runs: int = 0
    queries: int = 0
    keys: int = 0
    wanted: int = 0  # scores
    masked: bool = False  # see `AttentionCall._needs_mask`

    def joined(self, queries: int, keys: int, *, causal: bool) -> _Shape:
        """With a run of so many more."""
        other = queries != keys if causal else self.num_runs > 0 and keys != self.keys
        return _Shape(
            self.num_runs + 1,
            max(self.queries, queries),
            max(self.keys, keys),
            self.wanted + queries * keys,
            self.masked or other,
        )

    @property
    def fits(self) -> bool:
        scores = self.num_runs * self.queries * self.keys
        return scores <= MAX_PADDING * self.wanted and (not self.masked or scores <= MAX_MASKED)


def attention_calls(
    cu_seqlens: Tensor, parents: Sequence[int], rank: int = 0, size: int = 1
) -> tuple[AttentionCall, ...]:
    """The calls for this rank's tokens; the first has all of them as queries, in order.

    Args:
        cu_seqlens: [N+1], of the segments; each a multiple of 2 * size long where size is more than 1.
        parents: [N], the segment that each sees whole besides itself, -1 for none. A parent has none itself, and its
            children come right behind it.
        rank: of `size` context-parallel ranks.
    """
    edges = cu_seqlens.tolist()
    local = [edge // size for edge in edges]  # of this rank's tokens
    segments = range(len(parents))
    families = [(parent, list(children)) for parent, children in groupby(segments, lambda s: parents[s]) if parent >= 0]
    assert all(parents[parent] < 0 and children[0] == parent + 1 for parent, children in families), parents
    own = [run for s in segments for run in _own_runs(edges[s], edges[s + 1], local[s], rank, size)]
    joint = [(local[kids[0]], local[kids[-1] + 1], edges[p], edges[p + 1]) for p, kids in families]
    device, whole = cu_seqlens.device, size == 1
    calls = [_call(own, device, causal=True, all_queries=True, all_keys=whole)]
    if joint:
        calls.append(_call(joint, device, causal=False, all_queries=False, all_keys=False))
    return tuple(calls)


def _own_runs(start: int, end: int, local: int, rank: int, size: int) -> list[Run]:
    """Of a segment [start, end) of the row, whose first token here is `local`."""
    if size == 1:
        return [(start, end, start, end)]
    part = (end - start) // (2 * size)
    ends = (start + (rank + 1) * part, start + (2 * size - rank) * part)
    return [(local + number * part, local + (number + 1) * part, start, seen) for number, seen in enumerate(ends)]


def _call(
    runs: Sequence[Run], device: torch.device, *, causal: bool, all_queries: bool, all_keys: bool
) -> AttentionCall:
    lengths = tuple((run[1] - run[0], run[3] - run[2]) for run in runs)
    return AttentionCall(
        query_rows=None if all_queries else _rows([run[:2] for run in runs], device),
        key_rows=None if all_keys else _rows([run[2:] for run in runs], device),
        cu_queries=_cumulated([queries for queries, _ in lengths], device),
        cu_keys=_cumulated([keys for _, keys in lengths], device),
        lengths=lengths,
        causal=causal,
        keys_once=all(before[1] <= after[0] for before, after in pairwise(sorted(run[2:] for run in runs))),
    )


def _rows(spans: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(*span) for span in spans]).to(device)


def _cumulated(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
