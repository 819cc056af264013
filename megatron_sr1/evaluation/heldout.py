"""The held-out prompts, each read when an engine has room for it: a benchmark need not fit into memory."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence

from megatron_sr1.data import Check, Deal, Quarantine, ShardDataset, only_prompts
from megatron_sr1.data.feed import equal_runs
from megatron_sr1.data.yes_no import yes_no_of
from megatron_sr1.ranks import ALONE, Ranks
from megatron_sr1.types import Prompt, PromptShare


class Heldout:
    """The good samples of a dataset, by their numbers in the order of its shards, read by who needs them."""

    def __init__(
        self,
        dataset: ShardDataset,
        quarantine: Quarantine,
        max_prompts: int = 0,
        check: Check | None = None,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            max_prompts: 0: all.
            check: raises ValueError for a sample that can be read and still not be used; it counts as a bad one.
            ranks: all that take the same rounds; a sample that any of them finds bad, all pass over.
        """
        self._dataset = dataset
        self._quarantine = quarantine
        self._max_prompts = max_prompts
        self._check = check
        self._ranks = ranks
        self._readers: Ranks = ALONE
        self._deal: Deal = equal_runs
        self._lock = threading.Lock()  # of the quarantine

    def divide(self, readers: Ranks, deal: Deal) -> None:
        """From now on the samples of a round are dealt out.

        Args:
            readers: those among whom, and which of them this rank is of.
            deal: who of them begins with which.
        """
        self._readers, self._deal = readers, deal

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

    def rounds(self, answered: Collection[int] = (), size: int = 0) -> Iterator[PromptShare]:
        """The prompts that are left, by the number of their sample: all in one round, and as many further ones as it
        has found bad. Collective.

        Args:
            answered: numbers of samples that are done.
            size: a round is of one run of so many samples, and whole: where one of them is left, all are done again;
                0: of any, and of what is left alone.

        Raises:
            ValueError: on every rank: more bad samples than the quarantine takes, or a sample is a demonstration. On
                this rank alone, while a round is read: it has found more than that, or a demonstration.
        """
        done = set(answered)
        keys = [self._dataset.place(index)[1] for index in range(len(self._dataset))]
        for part in self._parts(size):
            if size and self._begin(done, part):
                done.difference_update(part)
            yield from self._rounds_of(part, done, keys)

    def _rounds_of(self, part: range, done: set[int], keys: Sequence[str]) -> Iterator[PromptShare]:
        while chosen := self._begin(done, part):
            known = [self._dataset.describe(index) for index in chosen]
            dealt = self._deal(known, self._readers.num_ranks)
            yield PromptShare(keys, {}, [[chosen[place] for place in places] for places in dealt], self._read)
            for bad in self._ranks.gather(list(self._quarantine.bad)):
                self._quarantine.add(bad)
            done.update(index for index in chosen if not self._is_bad(index))

    def places(self, keys: Sequence[str]) -> list[int]:
        """The numbers of the first good samples, which have these keys, in order; what was passed over must be bad
        again.

        Raises:
            ValueError: they are other samples.
        """
        found: list[int] = []
        index = 0
        for key in keys:
            while index < len(self._dataset) and self._dataset.place(index)[1] != key:
                if self._read(index) is not None:
                    raise ValueError(_other_samples(key))
                index += 1
            if index == len(self._dataset):
                raise ValueError(_other_samples(key))
            found.append(index)
            index += 1
        return found

    def first(self, count: int) -> list[Prompt]:
        """The first good prompts, at most `count`, read here. Raises as `rounds`."""
        found: list[Prompt] = []
        for index in range(len(self._dataset)):
            if len(found) == count or len(found) == (self._max_prompts or count):
                break
            found += [prompt for prompt in [self._read(index)] if prompt is not None]
        return found

    def _parts(self, size: int) -> list[range]:
        size = size or len(self._dataset)
        starts = range(0, len(self._dataset), size)
        return [range(start, min(start + size, len(self._dataset))) for start in starts]

    def _begin(self, done: set[int], part: range) -> list[int]:
        """The numbers of a part's next round, of which the first is good, if any is left."""
        room = (self._max_prompts or len(self._dataset)) - len(done)
        chosen: list[int] = []
        for index in part:
            if len(chosen) == room:
                break
            if index in done or self._is_bad(index) or not (chosen or self._read(index) is not None):
                continue
            chosen.append(index)
        return chosen

    def _is_bad(self, index: int) -> bool:
        return self._dataset.place(index) in self._quarantine

    def _read(self, index: int) -> Prompt | None:
        """None where the sample is bad. Any thread may call it."""
        if self._is_bad(index):
            return None
        try:
            sample = self._dataset.read(index)
            if isinstance(sample, Prompt):
                yes_no_of(sample)
            if self._check is not None:
                self._check(sample)
        except ValueError as error:
            with self._lock:
                self._quarantine.add(self._dataset.bad(index, error))
            return None
        (prompt,) = only_prompts([sample], "data.heldout")
        return prompt


def _other_samples(key: str) -> str:
    return (
        f"the records of this evaluation hold {key!r} where data.heldout has another sample. Restore the file of "
        "records, or start over with --restart."
    )
