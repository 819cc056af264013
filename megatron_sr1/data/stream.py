"""An endless shuffled stream over one dataset or a mixture, that can be entered anywhere."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_sr1.data.index import IndexedSample
from megatron_sr1.data.order import EpochOrder, Mixture
from megatron_sr1.data.quarantine import BadSample
from megatron_sr1.data.shards import ShardDataset
from megatron_sr1.types import Prompt, SftSample

DEFAULT_WINDOW = 65_536  # samples
VisualTokens = Callable[[tuple[int, int]], int]  # (width, height) of an image -> its tokens in the prompt


@dataclass(frozen=True)
class SampleSize:
    """What is known of a sample before it is decoded."""

    key: str
    num_bytes: int  # of its members in the shard
    image_sizes: tuple[tuple[int, int], ...]  # width, height in pixels
    text_tokens: int | None  # ids of its prompt, each image counted as one; None: the index does not say

    def prompt_tokens(self, visual_tokens: VisualTokens) -> int | None:
        """Ids of its prompt with the images expanded; None where the index has no prompt lengths."""
        if self.text_tokens is None:
            return None
        return self.text_tokens + sum(visual_tokens(size) - 1 for size in self.image_sizes)


class SampleStream:
    """Position p of the stream is always the same sample: a pure function of the datasets, the weights, the seed and p.

    Samples are numbered through the datasets. Of each dataset every epoch holds every sample once, in an order of its
    own (see `EpochOrder`); whoever knows the position can go on from there.
    """

    def __init__(
        self,
        datasets: ShardDataset | Sequence[ShardDataset],
        seed: int,
        *,
        weights: Sequence[float] = (),
        window: int = DEFAULT_WINDOW,
        max_prompt_tokens: int = 0,
        needs_lengths: bool = True,
        visual_tokens: VisualTokens | None = None,
    ) -> None:
        """
        Args:
            weights: how often each dataset comes, in any unit; needed where there are several.
            window: samples that are shuffled together.
            max_prompt_tokens: longer prompts are left out, by the index alone; 0: none.
            needs_lengths: False: a dataset whose index lacks lengths is taken whole.
            visual_tokens: the model's, for that.

        Raises:
            ValueError: the seed is negative, the weights do not fit, prompt lengths are needed and not in an index, or
                none is short enough.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must be 0 or more.")
        if window < 1:
            raise ValueError(f"window={window} must be 1 or more.")
        self._datasets = (datasets,) if isinstance(datasets, ShardDataset) else tuple(datasets)
        weights = weights or (1.0,) * (len(self._datasets) == 1)
        if len(weights) != len(self._datasets):
            raise ValueError(f"there are {len(weights)} weights for {len(self._datasets)} datasets; give one for each.")
        self._starts = [0, *itertools.accumulate(len(dataset) for dataset in self._datasets)]
        limits = [max_prompt_tokens if needs_lengths or dataset.has_lengths else 0 for dataset in self._datasets]
        self._kept = [
            _short_enough(dataset, limit, visual_tokens) for dataset, limit in zip(self._datasets, limits, strict=True)
        ]
        self._mixture = Mixture(weights, seed)
        self._orders = [
            EpochOrder(np.bincount(dataset.shard_of[kept]).tolist(), window, seed, number)
            for number, (dataset, kept) in enumerate(zip(self._datasets, self._kept, strict=True))
        ]
        self.seed = seed
        self._window = window

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of all that the order depends on but the seed and the position."""
        kept = [hashlib.sha256(kept.tobytes()).hexdigest() for kept in self._kept]
        parts = [*(dataset.fingerprint for dataset in self._datasets), *kept, self._mixture.counts, self._window]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def shard_fingerprints(self) -> tuple[tuple[str, str], ...]:
        """Name and fingerprint of each shard, of all datasets."""
        return tuple(pair for dataset in self._datasets for pair in dataset.shard_fingerprints)

    @property
    def num_left_out(self) -> int:
        """Samples whose prompts are too long."""
        return self._starts[-1] - self.num_samples

    def check_images(self, max_images: int, key: str) -> None:
        """See `ShardDataset.check_images`, of all that the stream hands out."""
        for dataset, kept in zip(self._datasets, self._kept, strict=True):
            dataset.check_images(max_images, key, kept)

    @property
    def num_samples(self) -> int:
        """Samples of all datasets that are short enough."""
        return sum(len(kept) for kept in self._kept)

    def indices(self, position: int, count: int) -> list[int]:
        """Numbers of the samples at the positions [position, position + count).

        Raises:
            ValueError: position or count is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position={position} and count={count} must be 0 or more.")
        return [self.index(place) for place in range(position, position + count)]

    def index(self, position: int) -> int:
        """The number of the sample at `position`, which must be 0 or more."""
        number, place = self._mixture.place(position)
        return self._starts[number] + int(self._kept[number][self._orders[number].sample(place)])

    def take(self, position: int, count: int) -> list[Prompt | SftSample]:
        """Reads the samples at the positions [position, position + count); see `ShardDataset.read` for errors."""
        return [self.read(i) for i in self.indices(position, count)]

    def sizes(self, position: int, count: int) -> list[SampleSize]:
        """What is known of the samples at [position, position + count) before they are decoded, for planning ahead.

        Raises:
            ValueError: there is no index, and the header of an image cannot be read.
        """
        return [self.size(i) for i in self.indices(position, count)]

    def size(self, index: int) -> SampleSize:
        """As `sizes`, of the sample with this number."""
        return _size(*self._in_dataset(index))

    def read(self, index: int) -> Prompt | SftSample:
        """Reads the sample with this number; see `ShardDataset.read` for errors."""
        return self.decode(index, self.fetch(index))

    def fetch(self, index: int) -> dict[str, bytes]:
        """The bytes of the sample with this number; see `ShardDataset.fetch`."""
        dataset, i = self._in_dataset(index)
        return dataset.fetch(i)

    def decode(self, index: int, members: Mapping[str, bytes]) -> Prompt | SftSample:
        """The sample with this number, of what `fetch` returned; see `ShardDataset.decode`."""
        dataset, i = self._in_dataset(index)
        return dataset.decode(i, members)

    def indexed(self, index: int) -> IndexedSample:
        """What the index of its shard says of the sample with this number."""
        dataset, i = self._in_dataset(index)
        return dataset.describe(i)

    def key(self, index: int) -> str:
        """The key of the sample with this number."""
        return self.place(index)[1]

    @property
    def shard_names(self) -> frozenset[str]:
        """What the quarantine calls the shards of all datasets."""
        return frozenset(name for dataset in self._datasets for name in dataset.names)

    def place(self, index: int) -> tuple[str, str]:
        """Shard and key of the sample with this number, as the quarantine names it."""
        dataset, i = self._in_dataset(index)
        return dataset.place(i)

    def bad(self, index: int, error: ValueError) -> BadSample:
        """The quarantine's entry for a sample that could not be read."""
        dataset, i = self._in_dataset(index)
        return dataset.bad(i, error)

    def _in_dataset(self, index: int) -> tuple[ShardDataset, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._datasets[number], index - self._starts[number]


def _size(dataset: ShardDataset, i: int) -> SampleSize:
    sample = dataset.describe(i)
    return SampleSize(sample.key, sum(sample.sizes), dataset.image_sizes(i), sample.text_tokens)


def _short_enough(dataset: ShardDataset, limit: int, visual_tokens: VisualTokens | None) -> np.ndarray:
    """Numbers, ascending, of the samples whose prompt has at most `limit` tokens; of all where there is no limit."""
    if not limit:
        return np.arange(len(dataset))
    assert visual_tokens is not None, "a limit needs the model's visual tokens"
    kept = []
    for i in range(len(dataset)):
        tokens = _size(dataset, i).prompt_tokens(visual_tokens)
        if tokens is None:
            raise ValueError(
                f"{dataset.where(i)}: data.max_prompt_tokens={limit} needs prompt lengths, and the shard has no index "
                "with them. Build one with tools/build_shards.py --model, or set data.max_prompt_tokens to 0."
            )
        if tokens <= limit:
            kept.append(i)
    if not kept:
        raise ValueError(
            f"{dataset.where(0)} and all others have prompts longer than {limit} tokens. Raise "
            "data.max_prompt_tokens, or rollout.max_model_tokens where that is not set."
        )
    return np.array(kept)
