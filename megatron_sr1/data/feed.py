"""Hands out a stream's samples: read ahead by worker threads, bad ones passed over, the place in the stream kept.

Which samples come, and in which order, depends on the stream and on the bytes of its shards only: not on the number of
workers or ranks. Pillow decodes without holding the interpreter's lock, so threads are enough, and nothing is pickled.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from megatron_sr1.data.index import IndexedSample
from megatron_sr1.data.quarantine import BadSample, Quarantine
from megatron_sr1.data.state import StreamState
from megatron_sr1.data.stream import SampleStream
from megatron_sr1.phases import during
from megatron_sr1.ranks import ALONE, Ranks
from megatron_sr1.types import Prompt, SftSample

Check = Callable[[Prompt | SftSample], None]  # raises ValueError for a sample that cannot be used
DEFAULT_PREFETCH = 256 << 20  # bytes
_DECODED_PER_ENCODED = 12  # RGB bytes for a byte of PNG or JPEG: a guess, until a sample is decoded


# the places of a batch's samples that each of so many readers reads, each list increasing, by what the index says
Deal = Callable[[Sequence[IndexedSample], int], list[list[int]]]


def equal_runs(samples: Sequence[IndexedSample], num_readers: int) -> list[list[int]]:
    """A `Deal`: those of all readers, one after the other, are all."""
    edges = [len(samples) * reader // num_readers for reader in range(num_readers + 1)]
    return [list(range(start, end)) for start, end in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Batch:
    """Consecutive good samples of a stream, of which this rank has read its share."""

    positions: tuple[int, ...]  # of all
    indices: tuple[int, ...]  # of all, in the stream's numbering of samples
    keys: tuple[str, ...]  # of all
    own: Mapping[int, Prompt | SftSample]  # by place among all
    shares: Sequence[Sequence[int]] = ()  # the places of each reader's

    @property
    def samples(self) -> tuple[Prompt | SftSample, ...]:
        """Those that were read here, in order."""
        return tuple(self.own.values())


class SampleFeed:
    """The samples of a stream, batch after batch. Use it in a `with`, which ends the workers."""

    def __init__(
        self,
        stream: SampleStream,
        quarantine: Quarantine,
        *,
        workers: int = 2,
        prefetch_bytes: int = DEFAULT_PREFETCH,
        ranks: Ranks = ALONE,
        check: Check | None = None,
    ) -> None:
        """
        Args:
            workers: threads that decode, and as many that read what they decode next.
            prefetch_bytes: of encoded and decoded samples that wait to be handed out, about; never more than a batch.
            ranks: whoever takes the same batches; a sample that any rank finds bad, all pass over.
            check: what a sample must hold beyond being readable; one it raises ValueError for is bad.
        """
        self._stream = stream
        self._quarantine = quarantine
        self.ranks = ranks
        self._readers: Ranks = ALONE
        self._deal: Deal = equal_runs
        self._check = check
        self._workers = workers
        self._reader = _ReadAhead(stream, workers, prefetch_bytes)
        self._position = 0
        self._usual = 0  # the largest number that was asked for
        self._again: list[int] = []  # positions that were in flight when the state was saved
        self._in_flight: dict[int, str] = {}

    def __enter__(self) -> SampleFeed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def divide(self, readers: Ranks, deal: Deal = equal_runs) -> None:
        """From now on this rank reads its share of every batch alone; without it, all.

        Args:
            readers: those among whom a batch is dealt out, and which of them this rank is of.
            deal: who of them reads what.
        """
        self._readers, self._deal = readers, deal

    @property
    def position(self) -> int:
        """All positions before it were handed out, or are bad."""
        return self._position

    @property
    def num_samples(self) -> int:
        """Of a pass over the data, with those that turn out bad only when they are read."""
        return self._stream.num_samples

    @property
    def fingerprint(self) -> str:
        """Of the stream."""
        return self._stream.fingerprint

    @property
    def metrics(self) -> dict[str, float]:
        """Of the run so far: bad samples, where any are let pass, and samples that were left out, where any were."""
        num_bad = self._quarantine.num_bad
        counts = {"data/bad_samples": float(num_bad)} if self._quarantine.budget else {}
        num_left_out = len(self._quarantine.bad) - num_bad
        return {**counts, "data/left_out": float(num_left_out)} if num_left_out else counts

    @during("read")
    def next(self, count: int, *, distinct: bool = False) -> Batch:
        """The next `count` good samples, which are in flight until `finish`. Collective.

        Args:
            distinct: end before the first sample that is in flight already, which then comes next.

        Raises:
            ValueError: more bad samples than the quarantine takes.
            OSError: a shard cannot be opened any more.
        """
        self._usual = max(self._usual, count)
        while True:
            ahead = self._upcoming(count + self._usual)
            positions = self._distinct(ahead[:count]) if distinct else ahead[:count]
            shares, place = self._dealt(positions), self._readers.rank
            mine, upcoming = shares[place], self._dealt(ahead[len(positions) :])[place]
            samples, bad = self._read(
                [positions[place] for place in mine],
                [*(positions[place] for place in mine), *(ahead[len(positions) + place] for place in upcoming)],
            )
            found = self.ranks.gather(bad)
            if not found:
                break
            for item in found:
                self._quarantine.add(item)
        self._advance(positions)
        keys = tuple(self._key(position) for position in positions)
        self._in_flight |= dict(zip(positions, keys, strict=True))
        indices = tuple(self._stream.index(position) for position in positions)
        return Batch(tuple(positions), indices, keys, dict(zip(mine, samples, strict=True)), shares)

    def look(self, count: int) -> tuple[Batch, list[str]]:
        """The next `count` samples without taking them, and why some of them are bad, which are left out here: neither
        the position nor the quarantine knows of it, and nothing that is read ahead is lost. Collective.

        Raises: as `next`, but for bad samples.
        """
        positions = self._upcoming(count)
        shares = self._dealt(positions)
        read, bad = self._read_apart({place: positions[place] for place in shares[self._readers.rank]})
        reasons = dict(sorted(self.ranks.gather(bad)))
        kept = [place for place in range(len(positions)) if place not in reasons]
        number = {place: index for index, place in enumerate(kept)}
        left = [positions[place] for place in kept]
        batch = Batch(
            tuple(left),
            tuple(self._stream.index(position) for position in left),
            tuple(self._key(position) for position in left),
            {number[place]: sample for place, sample in read.items() if place in number},
            [[number[place] for place in share if place in number] for share in shares],
        )
        return batch, list(reasons.values())

    def read(self, index: int) -> Prompt | SftSample:
        """A sample that some rank has read, here and now: one of `Batch.indices`. Any thread may call it.

        Raises:
            ValueError: see `ShardDataset.read`.
            OSError: its shard cannot be opened any more.
        """
        return self._stream.read(index)

    def finish(self, batch: Batch) -> None:
        """The samples of `batch` have done their work: a state that is saved from now on does not repeat them."""
        for position in batch.positions:
            del self._in_flight[position]

    def state(self) -> StreamState:
        """What `restore` needs; its size does not grow with the position."""
        waiting = [(position, self._key(position)) for position in self._again]
        return StreamState(
            fingerprint=self._stream.fingerprint,
            seed=self._stream.seed,
            position=self._position,
            in_flight=tuple(sorted([*self._in_flight.items(), *waiting])),
            shards=self._stream.shard_fingerprints,
            bad=self._quarantine.bad,
        )

    def restore(self, state: StreamState) -> None:
        """Goes on where `state` was taken: first what was in flight, then the next sample. Nothing is replayed.

        Raises:
            ValueError: the state is of another stream; the message says which shard changed.
        """
        state.check(self._stream.fingerprint, self._stream.seed, self._stream.shard_fingerprints)
        # what was bad before there were shards is found again whenever they are opened, maybe under another path
        names = self._stream.shard_names
        self._quarantine.remember(bad for bad in state.bad if bad.shard in names)
        self._reader.plan([])
        self._position = state.position
        self._in_flight = {}
        self._again = [position for position, _ in state.in_flight]
        assert all(self._key(position) == key for position, key in state.in_flight)

    def _read_apart(self, wanted: Mapping[int, int]) -> tuple[dict[int, Prompt | SftSample], list[tuple[int, str]]]:
        """The samples at the positions, by their places, beside what is read ahead; and why some of them are bad."""
        read: dict[int, Prompt | SftSample] = {}
        bad: list[tuple[int, str]] = []
        with ThreadPoolExecutor(self._workers, thread_name_prefix="sample-looks") as pool:
            indices = {place: self._stream.index(position) for place, position in wanted.items()}
            futures = {place: pool.submit(self._stream.read, index) for place, index in indices.items()}
            for place, future in futures.items():
                try:
                    sample = future.result()
                    if self._check is not None:
                        self._check(sample)
                    read[place] = sample
                except ValueError as error:
                    bad.append((place, str(error)))
        return read, bad

    def _distinct(self, positions: list[int]) -> list[int]:
        """Those before the first whose sample is in flight, or comes twice."""
        taken = {self._stream.index(position) for position in self._in_flight}
        for number, position in enumerate(positions):
            index = self._stream.index(position)
            if index in taken:
                return positions[:number]
            taken.add(index)
        return positions

    def _dealt(self, positions: list[int]) -> list[list[int]]:
        """The places of those that each reader reads."""
        known = [self._stream.indexed(self._stream.index(position)) for position in positions]
        return self._deal(known, self._readers.num_ranks)

    def _advance(self, positions: list[int]) -> None:
        again = set(self._again)
        fresh = [position for position in positions if position not in again]
        self._again = [place for place in self._again if place not in set(positions) and not self._is_bad(place)]
        if fresh:
            self._position = fresh[-1] + 1

    def _upcoming(self, count: int) -> list[int]:
        """The next `count` positions that are not known to be bad. Raises ValueError where all samples are."""
        found: list[int] = []
        bad: set[int] = set()  # samples, not positions: an epoch brings each again
        for position in self._candidates():
            if len(found) == count:
                break
            if not self._is_bad(position):
                found.append(position)
                continue
            bad.add(self._stream.index(position))
            if len(bad) >= self._stream.num_samples:
                place = self._stream.place(self._stream.index(position))
                reason = next(item.reason for item in self._quarantine.bad if (item.shard, item.key) == place)
                raise ValueError(f"no sample of the training data can be used. {reason}")
        return found

    def _candidates(self) -> Iterator[int]:
        yield from self._again
        yield from itertools.count(self._position)

    def _is_bad(self, position: int) -> bool:
        if not self._quarantine.bad:
            return False
        return self._stream.place(self._stream.index(position)) in self._quarantine

    def _key(self, position: int) -> str:
        return self._stream.key(self._stream.index(position))

    def _read(self, wanted: list[int], order: list[int]) -> tuple[list[Prompt | SftSample], list[BadSample]]:
        """The samples at `wanted`, and what is bad of them; reads ahead in `order`, which begins with them."""
        samples, bad = [], []
        self._reader.plan(order)
        for position in wanted:
            try:
                sample = self._reader.get(position)
                if self._check is not None:
                    self._check(sample)
                samples.append(sample)
            except ValueError as error:
                bad.append(self._stream.bad(self._stream.index(position), error))
        self._reader.fill()
        return samples, bad


class _ReadAhead:
    """Samples that are being read, or wait; about `max_bytes` of them."""

    def __init__(self, stream: SampleStream, workers: int, max_bytes: int) -> None:
        self._stream = stream
        # waiting for a storage and checking what it gave need no decoder, which is what a step waits for
        self._readers = ThreadPoolExecutor(workers, thread_name_prefix="sample-readers")
        self._decoders = ThreadPoolExecutor(workers, thread_name_prefix="sample-decoders")
        self._max_bytes = max_bytes
        self._futures: dict[int, Future[Prompt | SftSample]] = {}  # by position
        self._fetched: dict[int, Future[dict[str, bytes]]] = {}  # what they are decoded from
        self._planned: deque[int] = deque()  # positions, not yet started
        self._lock = threading.Lock()  # of the two below
        self._bytes: dict[int, int] = {}  # by position: guessed, then measured
        self._total = 0  # of `_bytes`

    def plan(self, order: list[int]) -> None:
        """The positions that will be asked for, in order. Others are dropped: a bad sample may have shifted a batch."""
        for position in set(self._futures) - set(order):
            self._futures.pop(position).cancel()
            self._fetched.pop(position).cancel()
            self._note(position, None)
        self._planned = deque(position for position in order if position not in self._futures)

    def fill(self) -> None:
        """Starts reading what is planned, as far as the bytes go."""
        while self._planned and (self._total < self._max_bytes or not self._futures):
            self._start(self._planned.popleft())

    def get(self, position: int) -> Prompt | SftSample:
        """The sample at `position`, the next one of the plan. Raises what `SampleStream.read` does."""
        self.fill()
        if position not in self._futures:  # samples of the next batch fill the bytes
            self._start(self._planned.popleft())
        try:
            return self._futures[position].result()
        finally:
            del self._futures[position], self._fetched[position]
            self._note(position, None)

    def close(self) -> None:
        """Ends the threads; what is planned is not read."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _start(self, position: int) -> None:
        index = self._stream.index(position)
        self._note(position, self._guess(index))
        self._fetched[position] = members = self._readers.submit(self._stream.fetch, index)
        self._futures[position] = self._decoders.submit(self._decode, position, index, members)

    def _decode(self, position: int, index: int, members: Future[dict[str, bytes]]) -> Prompt | SftSample:
        sample = self._stream.decode(index, members.result())
        images = (sample.prompt if isinstance(sample, SftSample) else sample).images
        self._note(position, 3 * sum(image.width * image.height for image in images), measured=True)
        return sample

    def _note(self, position: int, num_bytes: int | None, measured: bool = False) -> None:
        """Sets the bytes of a position; None removes it, and one that was removed is not measured any more."""
        with self._lock:
            if measured and position not in self._bytes:
                return
            self._total -= self._bytes.pop(position, 0)
            if num_bytes is not None:
                self._bytes[position] = num_bytes
                self._total += num_bytes

    def _guess(self, index: int) -> int:
        sample = self._stream.indexed(index)
        if sample.image_sizes is None:
            return sum(sample.sizes) * (1 + _DECODED_PER_ENCODED)
        return sum(sample.sizes) + 3 * sum(width * height for width, height in sample.image_sizes)
