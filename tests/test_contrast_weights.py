"""Weights after PGPO and CapPO, against numbers worked out by hand and a plain reading of their formulas."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_sr1.objective import response_weights, token_weighting


def test_gated_weights_by_hand() -> None:
    """Five tokens of which four are credited: D = 3 0.5 . 0.25 0.1 from 0.25 on: g = 4 1.5 1.25 1, of 7.75."""
    depends = torch.tensor([3.0, 0.5, 9.0, 0.25, 0.1])
    credited = torch.tensor([True, True, False, True, True])
    found = token_weighting(depends, credited, "gated", 0.4, 0.25).tolist()
    assert found == pytest.approx([16 / 7.75, 6 / 7.75, 1.0, 5 / 7.75, 4 / 7.75], rel=1e-6)
    assert sum(found) == pytest.approx(5), "the response keeps its mass"
    assert found[0] > 1 > found[4], "a token that depends gains, and one that does not pays"


def test_a_gate_that_parts_nothing_leaves_the_weights() -> None:
    everything, none = torch.ones(4).bool(), torch.zeros(4).bool()
    below = token_weighting(torch.tensor([0.1, 0.0, 0.2, 0.09]), everything, "gated", 0.4, 0.3)
    assert below.tolist() == [1, 1, 1, 1], "nothing passes"
    for depends in (0.0, 0.3, 10.0):
        same = token_weighting(torch.full((4,), depends), everything, "gated", 0.4, 0.25)
        assert same.tolist() == pytest.approx([1, 1, 1, 1], abs=1e-6), "all depend as much"
    assert token_weighting(torch.ones(4), none, "gated", 0.4, 0.25).tolist() == [1, 1, 1, 1], "nothing is credited"
    assert token_weighting(torch.zeros(0), torch.zeros(0).bool(), "gated", 0.4, 0.25).tolist() == [], "empty"
    one = token_weighting(torch.tensor([7.0]), torch.ones(1).bool(), "gated", 0.4, 0.25)
    assert one.tolist() == [1], "a response of one token"
    at_zero = token_weighting(torch.tensor([0.0, 1.0]), torch.ones(2).bool(), "gated", 0.4, 0.0)
    assert at_zero.tolist() == pytest.approx([2 / 3, 4 / 3]), "a threshold of 0 lets everything in with what it has"


def test_gated_weights_of_random_responses() -> None:
    """Against loops over tokens; mass is conserved, and a larger threshold never gives a token that fails it more."""
    drawn = random.Random(0)
    for _ in range(200):
        number, threshold = drawn.randint(1, 30), drawn.choice([0.0, 0.05, 0.5, 10.0])
        depends = [10 * drawn.random() ** 4 for _ in range(number)]
        credited = [drawn.random() < 0.7 for _ in range(number)]
        gates = [1 + depend if depend >= threshold else 1.0 for depend in depends]
        total = sum(gate for gate, has in zip(gates, credited, strict=True) if has)
        found = token_weighting(
            torch.tensor(depends, dtype=torch.float64), torch.tensor(credited), "gated", 0.4, threshold
        ).tolist()
        for place in range(number):
            expected = sum(credited) * gates[place] / total if credited[place] else 1.0
            assert found[place] == pytest.approx(expected, rel=1e-9), place
        assert sum(found) == pytest.approx(number, rel=1e-9)


def test_responses_that_say_the_same_weigh_more() -> None:
    """m = 1 2 4: 1 - z = 1 2/3 0, its mean 5/9: 0.9 + 0.1 * 9/5 of it."""
    means = torch.tensor([1.0, 2.0, 4.0])
    assert response_weights(means, 0.9, "consistent").tolist() == pytest.approx([1.08, 1.02, 0.9])
    assert response_weights(torch.tensor([2.0, 2.0]), 0.9, "consistent").tolist() == [1, 1]
    assert response_weights(torch.zeros(0), 0.9, "consistent").tolist() == []
    assert response_weights(torch.tensor([0.0, 3.0]), 0.5, "consistent").tolist() == [1.5, 0.5]


def test_weights_of_random_steps_fall_as_responses_diverge() -> None:
    drawn = random.Random(1)
    for _ in range(100):
        means = [drawn.random() * 3 for _ in range(drawn.randint(2, 12))]
        low = drawn.choice([0.0, 0.5, 0.9])
        near = [(max(means) - mean) / (max(means) - min(means)) for mean in means]
        expected = [low + (1 - low) * one * len(near) / sum(near) for one in near]
        found = response_weights(torch.tensor(means, dtype=torch.float64), low, "consistent").tolist()
        assert found == pytest.approx(expected, rel=1e-9) and sum(found) == pytest.approx(len(means))
        ranked = [weight for _, weight in sorted(zip(means, found, strict=True))]
        assert ranked == sorted(ranked, reverse=True)
