"""The held-out prompts, read chunk by chunk: a benchmark need not fit into memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from megatron_sr1.data import Check, Quarantine, ShardDataset, only_prompts
from megatron_sr1.types import Prompt


class Heldout:
    """The good samples of a dataset in the order of its shards, each read when it is needed."""

    def __init__(
        self, dataset: ShardDataset, quarantine: Quarantine, max_prompts: int = 0, check: Check | None = None
    ) -> None:
        """
        Args:
            max_prompts: 0: all.
            check: raises ValueError for a sample that can be read and still not be used; it counts as a bad one.
        """
        self._dataset = dataset
        self._quarantine = quarantine
        self._max_prompts = max_prompts
        self._check = check

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

    def chunks(self, size: int, answered: Sequence[str] = ()) -> Iterator[list[Prompt]]:
        """The prompts in lists of `size`, the last one shorter.

        Args:
            answered: keys of the first good samples, in order, which are passed over unread.

        Raises:
            ValueError: more bad samples than the quarantine takes, a sample is a demonstration, or `answered` names
                other samples than the first.
        """
        chunk: list[Prompt] = []
        for prompt in self._prompts(answered):
            chunk.append(prompt)
            if len(chunk) == size:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def first(self, count: int) -> list[Prompt]:
        """The first prompts, at most `count`. Raises as `chunks`."""
        return next(self.chunks(count), []) if count else []

    def _prompts(self, answered: Sequence[str]) -> Iterator[Prompt]:
        known, found = deque(answered), len(answered)
        for index in range(len(self._dataset)):
            place = self._dataset.place(index)
            if known and known[0] == place[1]:
                known.popleft()
                continue
            if not known and self._max_prompts and found == self._max_prompts:
                break
            if place in self._quarantine:
                continue
            try:
                sample = self._dataset.read(index)
                if self._check is not None:
                    self._check(sample)
            except ValueError as error:
                self._quarantine.add(self._dataset.bad(index, error))
                continue
            if known:
                raise ValueError(_other_samples(known[0]))
            (prompt,) = only_prompts([sample], "data.heldout")
            found += 1
            yield prompt
        if known:
            raise ValueError(_other_samples(known[0]))


def _other_samples(key: str) -> str:
    return (
        f"the records of this evaluation hold {key!r} where data.heldout has another sample. Restore the file of "
        "records, or start over with --restart."
    )
