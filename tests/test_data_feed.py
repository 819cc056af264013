"""The feed: one order at any number of ranks and workers, exact resume, bad samples within a budget, bounded memory."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_sr1.data import (
    BadSample,
    LeftOut,
    Quarantine,
    SampleFeed,
    SampleStream,
    ShardDataset,
    StreamState,
    write_shards,
)
from megatron_sr1.ranks import Ranks
from megatron_sr1.types import Prompt, SftSample
from tests.data_cases import QUESTION, encoded, equal, noise, png, prompts, write_tar
from tests.test_data_index import indexed
from tests.thread_ranks import Meeting


def through_json(state: StreamState) -> StreamState:
    """As a checkpoint keeps it."""
    return StreamState.from_json(json.loads(json.dumps(state.to_json())))


def key_of(sample: Prompt | SftSample) -> str:
    return sample.key if isinstance(sample, Prompt) else sample.prompt.key


# ---------------------------------------------------------------- order and resume
@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ShardDataset]:
    folder = tmp_path_factory.mktemp("feed")
    made = {n: write_shards(prompts(n, start=100 * n), folder, f"n{n}", 3) for n in (1, 4, 11, 20)}
    return {n: ShardDataset(indexed(shards) if n != 11 else shards) for n, shards in made.items()}


def divided(stream: SampleStream, quarantine: Quarantine, ranks: Ranks, **options: Any) -> SampleFeed:
    """Of which each rank reads its part."""
    feed = SampleFeed(stream, quarantine, ranks=ranks, **options)
    feed.divide(ranks)
    return feed


class Feeds:
    """Feeds of several ranks, each on a thread of its own."""

    def __init__(self, num_ranks: int, make: Callable[[Ranks], SampleFeed]) -> None:
        meeting = Meeting(num_ranks)
        self.feeds = [make(meeting.of(rank)) for rank in range(num_ranks)]
        self._pool = ThreadPoolExecutor(num_ranks)

    def step(self, count: int) -> list[str]:
        """One batch: the keys of all ranks, in rank order."""
        batches = list(self._pool.map(lambda feed: feed.next(count), self.feeds))
        for feed, batch in zip(self.feeds, batches, strict=True):
            feed.finish(batch)
        assert len({batch.positions for batch in batches}) == 1
        assert max(len(b.samples) for b in batches) - min(len(b.samples) for b in batches) <= 1
        return [key_of(sample) for batch in batches for sample in batch.samples]

    def close(self) -> list[StreamState]:
        states = [through_json(feed.state()) for feed in self.feeds]
        for feed in self.feeds:
            with feed:
                pass
        self._pool.shutdown()
        return states


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 4, 11, 20]), min_size=1, max_size=3, unique=True),
    weights=st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
    window=st.sampled_from([2, 7, 1000]),
    seed=st.integers(0, 2**32),
    parts=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    prefetch=st.sampled_from([1, 300, 1 << 20]),
)
def test_interrupted_runs_of_any_layout_give_the_order_of_one_rank(
    datasets: dict[int, ShardDataset],
    sizes: list[int],
    weights: list[float],
    window: int,
    seed: int,
    parts: list[tuple[int, int, list[int]]],
    prefetch: int,
) -> None:
    """Each part is a run of some ranks and workers that does some steps and is stopped."""
    chosen = [datasets[size] for size in sizes]
    shares = weights[: len(chosen)]
    found: list[str] = []
    state: StreamState | None = None
    for num_ranks, workers, steps in parts:

        def make(ranks: Ranks, workers: int = workers) -> SampleFeed:
            stream = SampleStream(chosen, seed, weights=shares, window=window)
            return divided(stream, Quarantine(0), ranks, workers=workers, prefetch_bytes=prefetch)

        ranks = Feeds(num_ranks, make)
        for feed in ranks.feeds if state is not None else ():
            feed.restore(state)
        for count in steps:
            found += ranks.step(count)
        states = ranks.close()
        assert states.count(states[0]) == num_ranks
        state = states[0]
    whole = SampleStream(chosen, seed, weights=shares, window=window)
    assert found == [whole.key(i) for i in whole.indices(0, len(found))]
    if len(chosen) == 1:
        epochs = [found[start : start + sizes[0]] for start in range(0, len(found), sizes[0])]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs), "nothing twice"
        assert all(len(epoch) == sizes[0] for epoch in epochs[:-1])


def test_take_and_the_feed_agree(datasets: dict[int, ShardDataset]) -> None:
    stream = SampleStream(datasets[11], 2)
    with SampleFeed(stream, Quarantine(0), workers=3) as feed:
        found = [sample for _ in range(5) for sample in feed.next(7).samples]
    assert all(equal(*pair) for pair in zip(found, stream.take(0, 35), strict=True))


def test_what_was_in_flight_comes_again_first(datasets: dict[int, ShardDataset]) -> None:
    stream = SampleStream(datasets[20], 9)
    keys = [stream.key(i) for i in stream.indices(0, 30)]
    with SampleFeed(stream, Quarantine(0)) as feed:
        first, second, third = feed.next(4), feed.next(4), feed.next(4)
        feed.finish(second)
        state = through_json(feed.state())
    assert state.position == 12
    assert list(state.in_flight) == [(p, keys[p]) for p in (*first.positions, *third.positions)]
    with SampleFeed(stream, Quarantine(0)) as feed:
        feed.restore(state)
        again = feed.next(5)
        assert [key_of(s) for s in again.samples] == [*keys[0:4], keys[8]]
        assert [p for p, _ in feed.state().in_flight] == [0, 1, 2, 3, 8, 9, 10, 11], "whether begun again or not"
        feed.finish(again)
        assert [key_of(s) for s in feed.next(5).samples] == [*keys[9:12], *keys[12:14]]
        assert feed.position == 14


def test_distinct_samples_end_before_the_first_that_is_in_flight(datasets: dict[int, ShardDataset]) -> None:
    """Which then comes next; a state that is saved in between gives the same."""
    stream = SampleStream(datasets[4], 9)
    keys = [stream.key(i) for i in stream.indices(0, 12)]
    with SampleFeed(stream, Quarantine(0)) as feed:
        first, more, none = feed.next(3), feed.next(5, distinct=True), feed.next(2, distinct=True)
        assert (first.positions, more.positions, none.positions) == ((0, 1, 2), (3,), ())
        state = through_json(feed.state())
        for batch in (first, more, none):
            feed.finish(batch)
        assert [key_of(s) for s in feed.next(7, distinct=True).samples] == keys[4:8]
    with SampleFeed(stream, Quarantine(0)) as feed:
        feed.restore(state)
        batches = [feed.next(3), feed.next(5, distinct=True), feed.next(2, distinct=True)]
        assert [batch.positions for batch in batches] == [(0, 1, 2), (3,), ()]
        assert [key_of(s) for s in feed.next(3).samples] == keys[4:7], "without `distinct` the order is the stream's"


def test_a_few_more_do_not_drop_what_was_read_ahead(datasets: dict[int, ShardDataset]) -> None:
    reads: list[int] = []

    class Watched(SampleStream):
        def fetch(self, index: int) -> dict[str, bytes]:
            reads.append(index)
            return super().fetch(index)

    with SampleFeed(Watched(datasets[20], 1), Quarantine(0), workers=1) as feed:
        for count in (6, 2, 1, 5):
            feed.next(count, distinct=True)
    assert len(set(reads)) == len(reads)


def test_resuming_far_on_reads_nothing_before(datasets: dict[int, ShardDataset]) -> None:
    reads: list[int] = []

    class Watched(SampleStream):
        def fetch(self, index: int) -> dict[str, bytes]:
            reads.append(index)
            return super().fetch(index)

    stream = Watched([datasets[11], datasets[20]], 1, weights=[2, 1], window=5)
    with SampleFeed(stream, Quarantine(0)) as feed:
        state = feed.state()
        assert len(json.dumps(state.to_json())) < 4000
        far = StreamState(**(vars(state) | {"position": 10**12}))
        feed.restore(far)
        batch = feed.next(3)
    assert batch.positions == (10**12, 10**12 + 1, 10**12 + 2)
    assert set(reads) <= set(stream.indices(10**12, 6)) and len(reads) <= 6


KILLED = """
import json, os, sys
from megatron_sr1.data import *
from megatron_sr1.data.feed import equal_runs
folder, ranks, workers, steps = sys.argv[1], *map(int, sys.argv[2:5])
shards = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".tar"))
stream = SampleStream(ShardDataset(shards), 7, window=16)
path = os.path.join(folder, "progress.json")
with SampleFeed(stream, Quarantine(0), workers=workers) as feed:
    keys = []
    if os.path.exists(path):
        saved = json.load(open(path))
        keys = saved["keys"]
        feed.restore(StreamState.from_json(saved["state"]))
    while len(keys) < steps:
        batch = feed.next(6)
        shares = equal_runs(batch.samples, ranks)
        keys += [batch.samples[place].key for share in shares for place in share]
        feed.finish(batch)
        with open(path + ".tmp", "w") as file:
            json.dump({"keys": keys, "state": feed.state().to_json()}, file)
        os.replace(path + ".tmp", path)
        print(len(keys), flush=True)
"""


def test_a_killed_run_goes_on_at_another_size(tmp_path: Path) -> None:
    samples = [Prompt(f"p{i}", "q", "1", (noise(i, (60, 60)),)) for i in range(50)]
    shards = indexed(write_shards(samples, tmp_path, "t", 8))
    stream = SampleStream(ShardDataset(shards), 7, window=16)
    wanted = [stream.key(i) for i in stream.indices(0, 600)]
    draw = random.Random(0)

    def start(ranks: int, workers: int) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(ranks), str(workers), "600"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])

    for ranks, workers in ((2, 2), (3, 1)):
        with start(ranks, workers) as process:
            assert process.stdout is not None
            for _ in range(draw.randrange(5, 20)):
                process.stdout.readline()
            time.sleep(draw.random() / 200)  # anywhere in a step
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        done = json.loads((tmp_path / "progress.json").read_text())["keys"]
        assert 0 < len(done) < 600 and done == wanted[: len(done)]
    with start(1, 3) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads((tmp_path / "progress.json").read_text())["keys"] == wanted


# ---------------------------------------------------------------- another dataset behind the same path
def test_a_changed_shard_is_named(tmp_path: Path) -> None:
    samples = [Prompt(f"p{i}", "q", "1", (noise(i, (9, 9)),)) for i in range(9)]

    def feed(changed: list[Prompt], shards: slice = slice(None), **options: object) -> SampleFeed:
        made = indexed(write_shards(changed, tmp_path, "t", 3))
        return SampleFeed(SampleStream(ShardDataset(made[shards]), 5, **options), Quarantine(0))

    with feed(samples) as first:
        state = through_json(first.state())
    with feed(samples) as same:
        same.restore(state)
    other = [*samples[:4], Prompt("p4", "q", "1", (noise(99, (9, 9)),)), *samples[5:]]  # as many bytes
    cases = {
        "t-00001.tar changed": feed(other),
        "t-00002.tar is missing": feed(samples, slice(0, 2)),
        "t-00003.tar is new": feed([*samples, Prompt("p9", "q", "1")]),
        "the shards are in another order": feed(samples, slice(None, None, -1)),
        "the weights, data.shuffle_window or data.max_prompt_tokens changed": feed(samples, window=4),
    }
    for message, fed in cases.items():
        with fed, pytest.raises(ValueError, match=f"not those that the run began with: {message}\\."):
            fed.restore(state)
    with feed(samples) as fed, pytest.raises(ValueError, match="seed=5, but the run began with seed=6"):
        fed.restore(StreamState(**(vars(state) | {"seed": 6})))
    with pytest.raises(ValueError, match="lacks fingerprint, seed"):
        StreamState.from_json({})


# ---------------------------------------------------------------- bad samples
def damaged(folder: Path) -> list[Path]:
    """24 samples in three shards, of which three cannot be read."""
    members: list[dict[str, bytes | dict]] = [{}, {}, {}]
    for i in range(24):
        members[i // 8] |= {f"s{i:02d}.json": QUESTION, f"s{i:02d}.0.png": png(i)}
    members[0]["s03.json"] = b"{"
    members[1]["s09.0.png"] = png(9)[:40]
    members[2]["s23.json"] = {"problem": "q"}
    return [write_tar(folder / f"d{number}.tar", content) for number, content in enumerate(members)]


BAD = {"s03", "s09", "s23"}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_bad_samples_are_passed_over_by_all_ranks(tmp_path: Path, num_ranks: int) -> None:
    dataset = ShardDataset(damaged(tmp_path))
    stream = SampleStream(dataset, 3, window=9)
    wanted = [key for key in (stream.key(i) for i in stream.indices(0, 80)) if key not in BAD]
    file = tmp_path / "out" / "train.jsonl"

    def make(ranks: Ranks) -> SampleFeed:
        quarantine = Quarantine(3, file if ranks.rank == 0 else None)
        return divided(SampleStream(dataset, 3, window=9), quarantine, ranks)

    ranks = Feeds(num_ranks, make)
    found = [key for _ in range(8) for key in ranks.step(7)]
    assert found == wanted[:56]
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(entry["shard"], entry["key"]) for entry in entries} == {
        ("d0.tar", "s03"),
        ("d1.tar", "s09"),
        ("d2.tar", "s23"),
    }
    assert all(f"sample '{entry['key']}'" in entry["reason"] for entry in entries)
    assert all(feed.metrics == {"data/bad_samples": 3.0} for feed in ranks.feeds)
    states = ranks.close()
    assert len(set(map(str, states))) == 1 and {bad.key for bad in states[0].bad} == BAD

    resumed = Feeds(2, make)
    for feed in resumed.feeds:
        feed.restore(states[0])
    assert resumed.step(9) == wanted[56:65]
    assert len(file.read_text().splitlines()) == 3, "what the first part found is still there"
    resumed.close()


def test_past_the_budget_the_list_is_given(tmp_path: Path) -> None:
    stream = SampleStream(ShardDataset(damaged(tmp_path)), 3)
    with SampleFeed(stream, Quarantine(2)) as feed:
        with pytest.raises(ValueError, match=r"data\.max_bad_samples=2 is exceeded") as caught:
            for _ in range(3):
                feed.finish(feed.next(8))
        assert all(f"'{key}'" in str(caught.value) for key in BAD)
    with SampleFeed(stream, Quarantine(0)) as feed:
        assert feed.metrics == {}
        with pytest.raises(ValueError, match=r"d\d\.tar, sample 's(03|09|23)'"):
            feed.next(24)


def test_a_sample_that_fails_the_check_is_a_bad_one(tmp_path: Path) -> None:
    """It is named with its shard, counts against the budget, and the others keep their order."""
    shards = write_shards(prompts(8), tmp_path, "t", 4)
    stream = SampleStream(ShardDataset(shards), 3)

    def check(sample: Any) -> None:
        if sample.key in unwanted:
            raise ValueError(f"sample {sample.key!r}: its prompt of 9 tokens is too long")

    unwanted: set[str] = set()
    with SampleFeed(stream, Quarantine(0), check=check) as feed:
        order = [sample.key for sample in feed.next(8).samples]
    unwanted = {order[2]}
    with SampleFeed(stream, quarantine := Quarantine(1), check=check) as feed:
        assert [sample.key for sample in feed.next(7).samples] == [key for key in order if key not in unwanted]
    assert [(bad.key, bad.reason) for bad in quarantine.bad] == [
        (order[2], f"sample {order[2]!r}: its prompt of 9 tokens is too long")
    ]
    with SampleFeed(stream, Quarantine(0), check=check) as feed, pytest.raises(ValueError, match=f"'{order[2]}'.*9"):
        feed.next(8)


def test_samples_that_are_left_out_are_counted_and_stop_nothing(tmp_path: Path) -> None:
    """Also after a state was saved and taken up: they stay out, and a bad sample still stops the run."""
    shards = write_shards(prompts(8), tmp_path, "t", 4)

    def check(sample: Prompt | SftSample) -> None:
        assert isinstance(sample, Prompt)
        if int(sample.answer) % 3 == 0:
            raise LeftOut(f"{sample.key} is too long")

    file = tmp_path / "quarantine.jsonl"
    with SampleFeed(SampleStream(ShardDataset(shards), 0), Quarantine(0, file), check=check) as feed:
        batches = [feed.next(2) for _ in range(3)]
        state = feed.state()
        metrics = feed.metrics
    answers = [int(sample.answer) for batch in batches for sample in batch.samples]
    assert sorted(answers[:5]) == [1, 2, 4, 5, 7] and metrics == {"data/left_out": 3.0}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["counts"] for line in lines} == {False} and len(lines) == 3
    with SampleFeed(SampleStream(ShardDataset(shards), 0), Quarantine(0), check=check) as feed:
        feed.restore(through_json(state))
        assert all(int(sample.answer) % 3 for sample in feed.next(4).samples)
        assert feed.metrics == {"data/left_out": 3.0}
    quarantine = Quarantine(0)
    quarantine.add(BadSample("a", "b", "too long", counts=False))
    with pytest.raises(ValueError, match="damaged"):
        quarantine.add(BadSample("a", "c", "damaged"))


def test_nothing_but_bad_samples_is_an_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.json": b"{", "b.json": b"["})
    with (
        SampleFeed(SampleStream(ShardDataset([shard]), 0), Quarantine(9)) as feed,
        pytest.raises(ValueError, match=r"no sample of the training data can be used.*Rewrite the shard"),
    ):
        feed.next(1)


@pytest.mark.filterwarnings("ignore:.*trying again in")
def test_a_shard_that_vanishes_is_no_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that fails for a moment must not make ranks drop samples."""
    monkeypatch.setattr("megatron_sr1.data.shards._RETRY_SECONDS", (0.01,))
    shards = write_shards(prompts(6), tmp_path, "t", 6)
    with SampleFeed(SampleStream(ShardDataset(shards), 0), Quarantine(99)) as feed:
        shards[0].unlink()
        with pytest.raises(OSError, match="cannot be read any more"):
            feed.next(2)
        assert feed.state().bad == ()


def test_jpeg_and_webp_are_decoded_as_pillow_does(tmp_path: Path) -> None:
    image = noise(5, (33, 21))
    kinds = {"jpg": "JPEG", "webp": "WEBP"}
    members: dict[str, bytes | dict] = {}
    for name, kind in kinds.items():
        members |= {f"{name}.json": QUESTION, f"{name}.0.{name}": encoded(image, kind)}
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", members)])
    with SampleFeed(SampleStream(dataset, 0), Quarantine(0)) as feed:
        found = {s.key: s.images[0] for s in feed.next(2).samples}
    for name, kind in kinds.items():
        wanted = Image.open(io.BytesIO(encoded(image, kind))).convert("RGB")
        assert found[name].tobytes() == wanted.tobytes()
