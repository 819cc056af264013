"""The order of a stream: every epoch whole, random access, reads that stay together, exact shares of a mixture."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.data.order import CYCLE, EpochOrder, Mixture

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(sum)
SEEDS = st.integers(0, 2**63)


@settings(max_examples=150, deadline=None)
@given(sizes=SHARDS, window=st.integers(1, 50), seed=SEEDS, epoch=st.integers(0, 10**6), stream=st.integers(0, 3))
def test_every_epoch_holds_every_sample_once(sizes: list[int], window: int, seed: int, epoch: int, stream: int) -> None:
    order, n = EpochOrder(sizes, window, seed, stream), sum(sizes)
    assert sorted(order.sample(epoch * n + offset) for offset in range(n)) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(sizes=SHARDS, window=st.integers(1, 50), seed=SEEDS, places=st.lists(st.integers(0, 300), min_size=1))
def test_any_place_can_be_entered(sizes: list[int], window: int, seed: int, places: list[int]) -> None:
    """Jumping about, and a new object for each place, give what reading from the start gives."""
    start = EpochOrder(sizes, window, seed)
    whole = [start.sample(place) for place in range(301)]
    jumping = EpochOrder(sizes, window, seed)
    for place in places:
        assert jumping.sample(place) == EpochOrder(sizes, window, seed).sample(place) == whole[place]


@settings(max_examples=100, deadline=None)
@given(sizes=SHARDS, window=st.integers(1, 20), seed=SEEDS, epoch=st.integers(0, 5))
def test_a_window_reads_shards_that_are_used_up_one_after_the_other(
    sizes: list[int], window: int, seed: int, epoch: int
) -> None:
    """Of the shards that a window touches, all but the first and the last are read whole in it; the windows that touch
    a shard follow each other. So no more shards are open than window / shard size + 2."""
    order, n = EpochOrder(sizes, window, seed), sum(sizes)
    if n <= window:
        return
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    read = [int(shard_of[order.sample(epoch * n + offset)]) for offset in range(n)]
    windows = [set(read[start : start + window]) for start in range(0, n, window)]
    for shard in set(read):
        touching = [number for number, shards in enumerate(windows) if shard in shards]
        assert touching == list(range(touching[0], touching[-1] + 1))
    for start, shards in zip(range(0, n, window), windows, strict=True):
        partly = [s for s in shards if read[start : start + window].count(s) < sizes[s]]
        assert len(partly) <= 2


def test_a_dataset_of_one_window_is_a_plain_permutation() -> None:
    """By numpy, without our code: the order of a run that began with any release."""
    for seed, epoch in itertools.product((0, 1, 2**40), (0, 3)):
        order = EpochOrder([5, 6], 11, seed)
        wanted = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(11)
        assert [order.sample(epoch * 11 + offset) for offset in range(11)] == wanted.tolist()


def test_the_two_level_order_is_pinned() -> None:
    """A checkpoint's position means the same samples after an upgrade: these lists must never change."""
    order = EpochOrder([3, 4, 2], 5, seed=5)
    assert [order.sample(place) for place in range(18)] == [6, 4, 7, 5, 3, 2, 8, 1, 0, 7, 2, 8, 1, 0, 4, 3, 5, 6]
    mixture = Mixture([3, 1], seed=5)
    assert [mixture.place(position) for position in (0, 1, 2, 3, 999, 1000)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (0, 2),
        (0, 749),
        (0, 750),
    ]


def test_seeds_epochs_windows_and_streams_differ() -> None:
    def places(seed: int, stream: int, start: int, window: int = 64) -> tuple[int, ...]:
        order = EpochOrder([32] * 4, window, seed, stream)
        return tuple(order.sample(place) for place in range(start, start + 64))

    found = {places(seed, stream, 128 * epoch) for seed in range(3) for stream in range(3) for epoch in range(3)}
    assert len(found) == 27
    first, second = places(0, 0, 0), places(0, 0, 64)
    assert not set(first) & set(second)
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


# ---------------------------------------------------------------- mixtures
@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.02, 10), min_size=1, max_size=5), seed=SEEDS, cycle=st.integers(0, 10**6))
def test_every_cycle_has_the_shares(weights: list[float], seed: int, cycle: int) -> None:
    if min(weights) / sum(weights) < 1 / CYCLE:
        return
    mixture = Mixture(weights, seed)
    found = [mixture.place(position) for position in range(cycle * CYCLE, (cycle + 1) * CYCLE)]
    for dataset, weight in enumerate(weights):
        places = [place for number, place in found if number == dataset]
        assert abs(len(places) - CYCLE * weight / math.fsum(weights)) <= 1
        assert places == list(range(cycle * len(places), (cycle + 1) * len(places))), "none left out, none twice"


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, positions=st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_a_mixture_can_be_entered_anywhere(seed: int, positions: list[int]) -> None:
    held = Mixture([0.5, 0.3, 0.2], seed)
    for position in positions:
        assert held.place(position) == Mixture([0.5, 0.3, 0.2], seed).place(position)


def test_datasets_are_well_mixed() -> None:
    """No run of one dataset that chance would not give: of 0.5 ** 30 x 10^5 places."""
    mixture = Mixture([1, 1], seed=0)
    found = [mixture.place(position)[0] for position in range(100_000)]
    assert max(len(list(run)) for _, run in itertools.groupby(found)) < 30
    assert {sum(found[start : start + 50]) for start in range(0, 5000, 50)} != {25}


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, math.nan], [math.inf, 1], [1, 1e-9]])
def test_weights_without_meaning_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights="):
        Mixture(weights, 0)
