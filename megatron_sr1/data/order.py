"""The order of the samples: pure functions of sizes, seed and position. Nothing is read here.

Two-level shuffle: an epoch puts the shards in a random order, cuts the samples of that sequence of shards into windows
and shuffles each window. Reads then stay inside the few shards of a window, one window after the other. A dataset that
fits into one window is shuffled as a whole.

Mixture: cycles of CYCLE positions; in every cycle dataset k has exactly counts[k] of them, in a random arrangement that
is the cycle's own. Position -> (dataset, position in that dataset's own stream) needs no replay of earlier cycles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CYCLE = 1000


def _generator(*words: int) -> np.random.Generator:
    while words[-1] == 0:  # a stream's first dataset and first draw: numpy pads short seeds with zeros too
        words = words[:-1]
        if len(words) <= 2:
            break
    return np.random.Generator(np.random.PCG64(list(words)))


class EpochOrder:
    """Place in the stream -> sample, for one dataset."""

    def __init__(self, shard_sizes: Sequence[int], window: int, seed: int, stream: int = 0) -> None:
        """
        Args:
            shard_sizes: samples of each shard; they are numbered through the shards.
            window: samples that are shuffled together.
            stream: tells the datasets of a mixture apart.
        """
        self.num_samples = sum(shard_sizes)
        self._sizes = np.array(shard_sizes, dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes  # first sample of each shard
        self._window = window
        self._seed = (seed, stream)
        self._epoch = -1  # whose shards are in order
        self._shards = np.empty(0, dtype=np.int64)
        self._ends = np.empty(0, dtype=np.int64)  # places where the epoch's shards end
        self._held = (-1, -1)  # epoch and window of the permutation that is held
        self._permutation = np.empty(0, dtype=np.int64)

    def sample(self, place: int) -> int:
        """The sample at `place` >= 0; epoch e has the places [e * n, (e + 1) * n), and every sample once."""
        epoch, offset = divmod(place, self.num_samples)
        window, inside = divmod(offset, self._window)
        if (epoch, window) != self._held:
            self._permutation = self._shuffled(epoch, window)
            self._held = (epoch, window)
        return int(self._permutation[inside])

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        seed, stream = self._seed
        if self.num_samples <= self._window:
            return _generator(seed, epoch, stream).permutation(self.num_samples)
        if epoch != self._epoch:
            self._shards = _generator(seed, epoch, stream).permutation(len(self._sizes))
            self._ends = np.cumsum(self._sizes[self._shards])
            self._epoch = epoch
        start = window * self._window
        places = np.arange(start, min(start + self._window, self.num_samples))
        order = np.searchsorted(self._ends, places, side="right")  # the how-manieth shard
        shards = self._shards[order]
        samples = self._starts[shards] + places - (self._ends[order] - self._sizes[shards])
        return _generator(seed, epoch, stream, window + 1).permutation(samples)


class Mixture:
    """Position in a stream of several datasets -> dataset and place in its own stream."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Weights are rounded to thousandths of their sum.

        Raises:
            ValueError: a weight is not positive, or too small to have a share.
        """
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(f"weights={list(weights)} must be positive numbers, one for each dataset.")
        shares = np.array(weights, dtype=np.float64) / math.fsum(weights) * CYCLE
        counts = np.floor(shares).astype(np.int64)
        rest = CYCLE - int(counts.sum())
        counts[np.argsort(counts - shares, kind="stable")[:rest]] += 1  # those that rounding cut most
        if counts.min() == 0:
            raise ValueError(
                f"weights={list(weights)}: the smallest is less than 1/{CYCLE} of their sum, which gives it no share. "
                "Raise it, or leave its dataset out."
            )
        self.counts: tuple[int, ...] = tuple(counts.tolist())
        self._seed = seed
        self._cycle = -1  # whose arrangement is held
        self._datasets = np.empty(0, dtype=np.int64)  # [CYCLE]
        self._ranks = np.empty(0, dtype=np.int64)  # [CYCLE] how many of the same dataset come before, in the cycle

    def place(self, position: int) -> tuple[int, int]:
        """Dataset, and place in its own stream, of the stream's `position` >= 0."""
        if len(self.counts) == 1:
            return 0, position
        cycle, inside = divmod(position, CYCLE)
        if cycle != self._cycle:
            self._arrange(cycle)
        dataset = int(self._datasets[inside])
        return dataset, cycle * self.counts[dataset] + int(self._ranks[inside])

    def _arrange(self, cycle: int) -> None:
        blocks = np.repeat(np.arange(len(self.counts)), self.counts)
        self._datasets = _generator(self._seed, cycle, len(self.counts)).permutation(blocks)
        self._ranks = np.empty(CYCLE, dtype=np.int64)
        for dataset, count in enumerate(self.counts):
            self._ranks[self._datasets == dataset] = np.arange(count)
        self._cycle = cycle
