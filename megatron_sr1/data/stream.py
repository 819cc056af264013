"""An endless shuffled stream of samples that can be resumed from one number."""

from __future__ import annotations

import numpy as np

from megatron_sr1.data.shards import ShardDataset
from megatron_sr1.types import Prompt, SftSample


class SampleStream:
    """Position p of the stream is sample permutation(seed, p // n)[p mod n] of the n samples.

    Every epoch is a permutation of its own, so nothing is lost or repeated inside an epoch, and the order is a pure
    function of (n, seed, position): whoever knows the position can go on from there.
    """

    def __init__(self, dataset: ShardDataset, seed: int) -> None:
        """Raises ValueError where the seed is negative."""
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        self._dataset = dataset
        self._seed = seed
        self._epoch = -1  # whose permutation is held
        self._permutation = np.empty(0, dtype=np.int64)

    def indices(self, position: int, count: int) -> list[int]:
        """Numbers, in the dataset, of the samples at the positions [position, position + count).

        Raises:
            ValueError: position or count is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position={position} and count={count} must be 0 or more.")
        num_samples = len(self._dataset)
        return [
            int(self._order(place // num_samples)[place % num_samples]) for place in range(position, position + count)
        ]

    def take(self, position: int, count: int) -> list[Prompt | SftSample]:
        """Reads the samples at the positions [position, position + count); see `ShardDataset.read` for errors."""
        return [self._dataset.read(i) for i in self.indices(position, count)]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._permutation = generator.permutation(len(self._dataset))
            self._epoch = epoch
        return self._permutation
