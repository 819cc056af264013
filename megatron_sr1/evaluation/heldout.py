"""The held-out prompts, read chunk by chunk: a benchmark need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_sr1.data import Check, Deal, Quarantine, SampleFeed, SamplesInOrder, ShardDataset, only_prompts
from megatron_sr1.data.feed import DEFAULT_PREFETCH
from megatron_sr1.ranks import ALONE, Ranks, agreed
from megatron_sr1.types import Prompt, PromptShare


class Heldout:
    """The good samples of a dataset in the order of its shards, each read when it is needed, by who needs it."""

    def __init__(
        self,
        dataset: ShardDataset,
        quarantine: Quarantine,
        max_prompts: int = 0,
        check: Check | None = None,
        *,
        workers: int = 2,
        prefetch_bytes: int = DEFAULT_PREFETCH,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            max_prompts: 0: all.
            check: raises ValueError for a sample that can be read and still not be used; it counts as a bad one.
            workers, prefetch_bytes, ranks: see `SampleFeed`.
        """
        self._dataset = dataset
        self._quarantine = quarantine
        self._max_prompts = max_prompts
        self._check = check
        self._ahead = {"workers": workers, "prefetch_bytes": prefetch_bytes}
        self._ranks = ranks
        self._division: tuple[Ranks, Deal] | None = None

    def divide(self, readers: Ranks, deal: Deal) -> None:
        """From now on this rank reads its share of every chunk, see `SampleFeed.divide`; without it, all."""
        self._division = readers, deal

    def __len__(self) -> int:
        """Prompts, at most: what is wrong with a sample may show only when it is read."""
        return min(len(self._dataset), self._max_prompts or len(self._dataset))

    @property
    def fingerprint(self) -> str:
        """Of the dataset."""
        return self._dataset.fingerprint

    def check_images(self, max_images: int) -> None:
        """Asks the shards' index, before an engine starts.

        Raises:
            ValueError: a prompt has more than `max_images` images; the message names the one with the most.
        """
        self._dataset.check_images(max_images, "data.heldout", range(len(self)))

    def chunks(self, size: int, answered: Sequence[str] = ()) -> Iterator[PromptShare]:
        """The prompts in chunks of `size`, the last one smaller. Collective.

        Args:
            answered: keys of the first good samples, in order, which are passed over unread.

        Raises:
            ValueError: more bad samples than the quarantine takes, a sample is a demonstration, or `answered` names
                other samples than the first.
        """
        limit, found = self._max_prompts or len(self._dataset), len(answered)
        stream = SamplesInOrder(self._dataset)
        with SampleFeed(stream, self._quarantine, **self._ahead, ranks=self._ranks, check=self._check) as feed:
            if self._division is not None:
                feed.divide(*self._division)
            feed.begin_at(self._behind(answered))
            while found < limit:
                count = min(size, limit - found)
                batch = feed.next(count, further=min(size, limit - found - count))
                feed.finish(batch)
                if not batch.keys:
                    return
                prompts = agreed(self._ranks, lambda samples=batch.samples: only_prompts(samples, "data.heldout"))
                found += len(batch.keys)
                yield PromptShare(batch.keys, dict(zip(batch.own, prompts, strict=True)))

    def first(self, count: int) -> list[Prompt]:
        """The first good prompts, at most `count`, read here. Raises as `chunks`."""
        found: list[Prompt] = []
        for index in range(len(self._dataset)):
            if len(found) == count or len(found) == (self._max_prompts or count):
                break
            found += [prompt for prompt in [self._read(index)] if prompt is not None]
        return found

    def _behind(self, answered: Sequence[str]) -> int:
        """The number of the first sample behind those that are answered; what was passed over must be bad again."""
        index = 0
        for key in answered:
            while index < len(self._dataset) and self._dataset.place(index)[1] != key:
                if self._read(index) is not None:
                    raise ValueError(_other_samples(key))
                index += 1
            if index == len(self._dataset):
                raise ValueError(_other_samples(key))
            index += 1
        return index

    def _read(self, index: int) -> Prompt | None:
        """None where the sample is bad."""
        if self._dataset.place(index) in self._quarantine:
            return None
        try:
            sample = self._dataset.read(index)
            if self._check is not None:
                self._check(sample)
        except ValueError as error:
            self._quarantine.add(self._dataset.bad(index, error))
            return None
        (prompt,) = only_prompts([sample], "data.heldout")
        return prompt


def _other_samples(key: str) -> str:
    return (
        f"the records of this evaluation hold {key!r} where data.heldout has another sample. Restore the file of "
        "records, or start over with --restart."
    )
