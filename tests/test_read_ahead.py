"""What a feed reads before it is asked: how much, beside what, and what it leaves when plans change or the run ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping
from concurrent.futures import wait
from pathlib import Path

import pytest

from megatron_sr1.data import Quarantine, SampleFeed, SampleStream, ShardDataset, write_shards
from megatron_sr1.data.index import index_path
from megatron_sr1.types import Prompt, SftSample
from tests.data_cases import noise, prompts
from tests.test_data_index import indexed


@pytest.mark.parametrize("with_index", [True, False])
def test_reading_ahead_is_bounded_by_bytes(tmp_path: Path, with_index: bool) -> None:
    """Images of 30 kB decoded, about as much encoded."""
    samples = [Prompt(f"p{i}", "q", "1", (noise(i, (100, 100)),)) for i in range(40)]
    shards = write_shards(samples, tmp_path, "t", 40)
    dataset = ShardDataset(indexed(shards) if with_index else shards)
    lock, read = threading.Lock(), [0]

    class Watched(SampleStream):
        def fetch(self, index: int) -> dict[str, bytes]:
            with lock:
                read[0] += 1
            return super().fetch(index)

    def ahead(budget: int, steps: int) -> int:
        """Samples read and not handed out, when all is quiet."""
        read[0] = 0
        feed = SampleFeed(Watched(dataset, 0), Quarantine(0), workers=2, prefetch_bytes=budget)
        for _ in range(steps):
            feed.finish(feed.next(8))
        with feed:
            started = list(feed._reader._futures.values())  # nothing more is started before the next batch
            assert not wait(started, timeout=60).not_done
            quiet = read[0] - 8 * steps
        return quiet

    assert index_path(shards[0]).exists() == with_index
    assert ahead(1, 3) <= 1
    assert 1 <= ahead(125_000, 3) <= 4
    assert ahead(1 << 30, 3) == 8, "never more than a batch"


def test_samples_are_read_while_others_are_decoded(tmp_path: Path) -> None:
    """One decoder stands at the first sample until the fourth was read."""
    dataset = ShardDataset(write_shards(prompts(8), tmp_path, "t", 8))
    fetched, fourth = itertools.count(1), threading.Event()

    class Watched(SampleStream):
        def fetch(self, index: int) -> dict[str, bytes]:
            if next(fetched) == 4:
                fourth.set()
            return super().fetch(index)

        def decode(self, index: int, members: Mapping[str, bytes]) -> Prompt | SftSample:
            assert fourth.wait(60)
            return super().decode(index, members)

    stream = Watched(dataset, 0)
    with SampleFeed(stream, Quarantine(0), workers=1) as feed:
        assert list(feed.next(5).keys) == [stream.key(stream.index(position)) for position in range(5)]


def test_what_is_dropped_is_not_read(tmp_path: Path) -> None:
    """A feed that goes on elsewhere reads there at once, and nothing more of where it was."""
    dataset = ShardDataset(write_shards(prompts(40), tmp_path, "t", 40))
    gate, fetched = threading.Event(), list[int]()

    class Slow(SampleStream):
        def fetch(self, index: int) -> dict[str, bytes]:
            fetched.append(index)
            assert gate.wait(60)
            return super().fetch(index)

    stream = Slow(dataset, 0)
    with SampleFeed(stream, Quarantine(0), workers=1) as feed:
        reader = feed._reader
        reader.plan(list(range(20)))
        reader.fill()
        reader.plan([30])
        gate.set()
        reader.get(30)
    assert len(fetched) <= 2 and fetched[-1] == stream.index(30)


def test_an_error_does_not_wait_for_what_is_planned(tmp_path: Path) -> None:
    class Slow(SampleStream):
        def fetch(self, index: int) -> dict[str, bytes]:
            time.sleep(0.05)
            return super().fetch(index)

    dataset = ShardDataset(write_shards(prompts(100), tmp_path, "t", 100))
    start = time.perf_counter()
    with SampleFeed(Slow(dataset, 0), Quarantine(0), workers=1) as feed:
        feed.next(2)
        feed.finish(feed.next(2))
        with pytest.raises(RuntimeError, match="of the caller"), feed:
            raise RuntimeError("of the caller")
    assert time.perf_counter() - start < 2
