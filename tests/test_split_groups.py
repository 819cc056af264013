"""Which data-parallel rank trains which sequences: balanced, and groups cut no more than that needs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.packing import Family, split_for_ranks, split_groups


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 500), max_size=40), num_ranks=st.integers(1, 8))
def test_split_for_ranks(lengths: list[int], num_ranks: int):
    ranks = split_for_ranks(lengths, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(index for rank in ranks for index in rank) == list(range(len(lengths)))
    assert all(rank == sorted(rank) for rank in ranks)
    assert sum(bool(rank) for rank in ranks) == min(num_ranks, len(lengths))
    loads = [sum(lengths[index] for index in rank) for rank in ranks]
    # longest-first: a rank's load exceeds another's by its last item at most
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_split_deals_the_longest_first():
    assert split_for_ranks([10, 10, 20], 2) == [[2], [0, 1]]


def test_split_for_no_ranks():
    with pytest.raises(ValueError, match="num_ranks=0"):
        split_for_ranks([1], 0)


_TOKENS = st.lists(st.integers(1, 500), max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.builds(Family, _TOKENS, _TOKENS), min_size=1, max_size=12),
    num_ranks=st.integers(1, 40),
)
def test_groups_are_cut_only_where_ranks_are_out_of_balance(groups: list[Family], num_ranks: int):
    ranks = split_groups(groups, num_ranks)
    tokens = {
        (index, number): count
        for index, group in enumerate(groups)
        for number, count in enumerate([*group.seeing, *group.blind])
    }
    assert len(ranks) == num_ranks and sorted(place for rank in ranks for place in rank) == sorted(tokens)
    assert all(rank == sorted(rank) for rank in ranks)

    def fullest(found: list[list[tuple[int, int]]]) -> int:
        return max(sum(tokens[place] for place in rank) for rank in found)

    mean = sum(tokens.values()) / num_ranks
    whole = split_for_ranks([sum(group.seeing) + sum(group.blind) for group in groups], num_ranks)
    as_groups = [[place for place in tokens if place[0] in rank] for rank in whole]
    if all(as_groups) and fullest(as_groups) <= 1.05 * mean:
        assert ranks == as_groups, "siblings share their images"
    places = [place for place in tokens if place[1] < len(groups[place[0]].seeing)]
    places += [place for place in tokens if place not in places]
    singles = split_for_ranks([tokens[place] for place in places], num_ranks)
    assert fullest(ranks) <= max(1.05 * mean, fullest([[places[index] for index in rank] for rank in singles]))
    assert sum(bool(rank) for rank in ranks) == min(num_ranks, len(tokens))


def test_a_group_without_sequences_is_no_work():
    assert split_groups([Family([]), Family([]), Family([], [1, 1])], 3) == [[(2, 0)], [(2, 1)], []]


def test_no_rank_is_left_without_work_among_many_that_have_some():
    """Twenty-four equal groups on twenty-five ranks are nearly balanced, but for the one that would wait for ever."""
    ranks = split_groups([Family([10, 10])] * 24, 25)
    assert all(ranks) and max(map(len, ranks)) == 2


def test_a_shared_prompt_counts_in_every_run():
    """Four siblings of a prompt of 100 tokens: cutting them costs the prompt again, which is worth it on two ranks only
    where responses are long; and nothing is lost where responses are empty."""
    assert split_groups([Family([10] * 4, (), 100), Family([10] * 4, (), 100)], 2) == [
        [(0, n) for n in range(4)],
        [(1, n) for n in range(4)],
    ]
    assert split_groups([Family([400] * 4, (), 100)], 2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    empty = split_groups([Family([0] * 4, (), 50), Family([100] * 4, (), 50)], 3)
    assert sorted(place for rank in empty for place in rank) == [(g, n) for g in range(2) for n in range(4)]


def test_texts_are_dealt_before_siblings_are_cut():
    """Of eight siblings on four ranks, each has two neighbours; texts beside them fill what is missing."""
    alone = [Family([10] * 8)]
    assert split_groups(alone, 4) == [[(0, n), (0, n + 1)] for n in (0, 2, 4, 6)]
    assert split_groups(alone, 1) == [[(0, n) for n in range(8)]] and split_groups([], 2) == [[], []]
    uneven = [Family([10, 10], [5, 5, 5, 5]), Family([10, 10, 10, 10])]
    assert split_groups(uneven, 2) == [[(0, n) for n in range(6)], [(1, n) for n in range(4)]]
    longer = [Family([10, 10]), Family([10, 10, 10], [10, 10, 10])]
    assert split_groups(longer, 2) == [[(1, 0), (1, 1), (1, 2), (1, 4)], [(0, 0), (0, 1), (1, 3), (1, 5)]]
