"""Intervals and pass@k against scipy, published values, brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from megatron_sr1.evaluation import ks_of, pass_at_k, share_of, wilson
from megatron_sr1.evaluation.statistics import difference_of


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right: int, trials: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(right / trials, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [1, 2, 7, 100, 4000])
def test_wilson_equals_scipy(trials: int) -> None:
    for right in sorted({0, 1, trials // 3, trials - 1, trials}):
        expected = binomtest(right, trials).proportion_ci(method="wilson")
        assert wilson(right / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0.0, trials)[0] == 0.0 and wilson(1.0, trials)[1] == 1.0, "exactly"


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for right in range(samples + 1):
        outcomes = [index < right for index in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(samples, right, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    """The mean over all outcomes of n = 6 draws with chance 0.3 is the chance that one of k draws is right."""
    n, chance = 6, 0.3
    for k in range(1, n + 1):
        weights = [math.comb(n, c) * chance**c * (1 - chance) ** (n - c) for c in range(n + 1)]
        mean = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(weights))
        assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_pass_at_k_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pass@5 of 4 samples"):
        pass_at_k(4, 1, 5)
    assert [ks_of(n) for n in (1, 2, 3, 8, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


@given(hits=st.lists(st.booleans(), min_size=1, max_size=40), copies=st.integers(1, 8))
@settings(deadline=None)
def test_samples_that_repeat_each_other_tell_nothing_new(hits: list[bool], copies: int) -> None:
    """The interval of prompts whose siblings are all alike is Wilson's over the prompts."""
    share = share_of([(copies * hit, copies) for hit in hits])
    assert share is not None and share.num_samples == copies * len(hits)
    assert (share.low, share.high) == pytest.approx(wilson(sum(hits) / len(hits), len(hits)), abs=1e-12)


@given(counts=st.lists(st.integers(0, 6).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))), max_size=30))
@settings(deadline=None)
def test_an_interval_holds_its_share(counts: list[tuple[int, int]]) -> None:
    share = share_of(counts)
    total = sum(samples for _, samples in counts)
    if total == 0:
        assert share is None
        return
    assert share is not None
    assert 0 <= share.low <= share.value <= share.high <= 1 and share.low < share.high
    assert share.value == sum(hits for hits, _ in counts) / total
    assert share.high - share.low >= np.subtract(*wilson(share.value, total)[::-1]) - 1e-12, "never narrower"


def _prompts(generator: np.random.Generator, num_prompts: int, samples: int) -> np.ndarray:
    """Hits of prompts that differ in difficulty: Beta(0.6, 0.9), mean 0.4."""
    return generator.binomial(samples, generator.beta(0.6, 0.9, num_prompts))


def test_the_interval_is_that_of_a_bootstrap_over_prompts() -> None:
    generator = np.random.default_rng(0)
    hits = _prompts(generator, 300, 8)
    share = share_of([(int(hit), 8) for hit in hits])
    resampled = hits[generator.integers(0, 300, (4000, 300))].mean(1) / 8
    assert share is not None
    assert (share.low, share.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.006)
    naive = wilson(share.value, 2400)
    assert share.high - share.low > 1.8 * (naive[1] - naive[0]), "siblings are alike: 2400 samples are far fewer"


def test_the_interval_covers_the_truth_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        share = share_of([(int(hit), 4) for hit in _prompts(generator, 80, 4)])
        assert share is not None
        covered += share.low <= 0.4 <= share.high
    assert 0.93 <= covered / 1500 <= 0.97


# ---------------------------------------------------------------- differences of paired shares
def _table(both: int, only_first: int, only_second: int, neither: int) -> list[tuple[int, int, int]]:
    return [(1, 1, 1)] * both + [(1, 0, 1)] * only_first + [(0, 1, 1)] * only_second + [(0, 0, 1)] * neither


@pytest.mark.parametrize("cells", [(20, 12, 2, 16), (3, 5, 0, 2), (0, 7, 9, 4), (1, 1, 1, 1)])
def test_a_difference_is_newcombe_s_of_its_fourfold_table(cells: tuple[int, int, int, int]) -> None:
    """Written out with the table's phi coefficient and scipy's Wilson intervals."""
    a, b, c, d = cells
    n = sum(cells)
    intervals = [binomtest(right, n).proportion_ci(method="wilson") for right in (a + b, a + c)]
    (p, low_p, high_p), (q, low_q, high_q) = (
        (right / n, interval.low, interval.high) for right, interval in zip((a + b, a + c), intervals, strict=True)
    )
    phi = (a * d - b * c) / math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    low = p - q - math.sqrt((p - low_p) ** 2 - 2 * phi * (p - low_p) * (high_q - q) + (high_q - q) ** 2)
    high = p - q + math.sqrt((high_p - p) ** 2 - 2 * phi * (high_p - p) * (q - low_q) + (q - low_q) ** 2)
    found = difference_of(_table(*cells))
    assert (found.value, found.low, found.high) == pytest.approx(((b - c) / n, low, high), abs=1e-12)
    assert found.num_samples == n


def test_a_difference_turned_round_has_the_interval_turned_round() -> None:
    one = difference_of(_table(4, 9, 3, 5))
    other = difference_of([(y, x, m) for x, y, m in _table(4, 9, 3, 5)])
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low), abs=1e-12)


def test_a_difference_stays_in_its_range_and_is_never_certain() -> None:
    for cells in ((0, 8, 0, 0), (8, 0, 0, 0), (0, 0, 0, 8), (0, 0, 8, 0), (5, 0, 0, 5), (0, 1, 0, 0)):
        found = difference_of(_table(*cells))
        assert -1 <= found.low <= found.value <= found.high <= 1, (cells, found)
    alike = difference_of(_table(5, 0, 0, 5))
    assert (alike.value, alike.low) == (0.0, -alike.high), "no sample tells them apart"
    nobody = difference_of(_table(0, 8, 0, 0))
    assert nobody.value == 1.0 and nobody.low < 0.8, "of eight samples"


@pytest.mark.parametrize("samples", [1, 4])
def test_a_difference_covers_the_truth_as_often_as_it_says(samples: int) -> None:
    """Second passes of chance z + 0.3 and priors of chance z, whose z is the prompt's, in its samples alike."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(800):
        chances = random.choice([0.1, 0.6], 60)
        x, y = random.binomial(samples, chances + 0.3), random.binomial(samples, chances)
        found = difference_of([(int(a), int(b), samples) for a, b in zip(x, y, strict=True)])
        covered += found.low <= 0.3 <= found.high
    assert 0.93 <= covered / 800 <= 0.985


def test_copies_of_a_sample_tell_nothing_more() -> None:
    once = difference_of(_table(6, 9, 2, 8))
    copied = difference_of([(4 * x, 4 * y, 4 * m) for x, y, m in _table(6, 9, 2, 8)])
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)
