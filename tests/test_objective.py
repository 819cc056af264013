"""Presets, advantages and token weights, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.config import PRESET_NAMES, ObjectiveConfig
from megatron_sr1.objective import (
    group_advantages,
    stream_advantages,
    token_weights,
)
from megatron_sr1.rewards import score_pair
from megatron_sr1.streams import PRESETS, Preset, preset_from_config
from megatron_sr1.types import Prompt, RewardStream, Rollout, RolloutPair

EPS = 1e-12
ROOT_HALF = math.sqrt(0.5)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


# ---------------------------------------------------------------- presets
# name: (template, second pass, [(stream, pass, tokens, rewards, lambda, normalize)])
EXPECTED_PRESETS = {
    "vision_r1": ("cot", False, [("answer", "first", "response", {"acc": 1, "fmt_cot": 0.1}, 1.0, "sum")]),
    "see_think": ("see_think", False, [("answer", "first", "response", {"acc": 1, "fmt": 0.1}, 1.0, "sum")]),
    "summed": (
        "see_think",
        True,
        [("answer", "first", "response", {"acc": 0.9, "fmt": 0.1, "acc_vis": 1}, 1.0, "sum")],
    ),
    "gdpo": (
        "see_think",
        True,
        [
            (
                "answer",
                "first",
                "response",
                {"acc": 1, "fmt": 0.1, "acc_vis": 1, "fmt_vis": 0.1},
                1.0,
                "per_component",
            )
        ],
    ),
    "vision_sr1": (
        "see_think",
        True,
        [
            ("answer", "first", "response", {"acc": 1, "fmt": 0.1}, 0.5, "sum"),
            ("visual", "second", "response", {"acc_vis": 1, "fmt_vis": 0.1}, 0.5, "sum"),
        ],
    ),
    "perception_credit": (
        "see_think",
        True,
        [
            ("answer", "first", "reasoning", {"acc": 1, "fmt": 0.1}, 0.5, "sum"),
            ("visual", "first", "description", {"acc_vis": 1, "fmt_vis": 0.1}, 0.5, "sum"),
        ],
    ),
    "external_reasoner": (
        "see_think",
        True,
        [
            ("answer", "first", "response", {"acc": 1, "fmt": 0.1}, 0.5, "sum"),
            ("visual", "first", "description", {"acc_judge": 1}, 0.5, "sum"),
        ],
    ),
    "papo": ("see_think", False, [("answer", "first", "response", {"acc": 1.0, "fmt": 0.1}, 1.0, "sum")]),
    "vppo": ("see_think", False, [("answer", "first", "response", {"acc": 1.0, "fmt": 0.1}, 1.0, "sum")]),
    "caprl": (
        "see_think",
        False,
        [("caption", "first", "description", {"acc_vis@reader": 1.0, "fmt": 0.1}, 1.0, "sum")],
    ),
    "visionary_r1": (
        "see_think",
        True,
        [("answer", "first", "response", {"acc": 1.0, "fmt": 0.1, "acc_vis": 1.0}, 1.0, "sum")],
    ),
    "pgpo": ("see_think", False, [("answer", "first", "response", {"acc": 1.0, "fmt": 0.1}, 1.0, "sum")]),
    "cappo": (
        "see_think",
        False,
        [
            ("answer", "first", "reasoning", {"acc": 1.0, "fmt": 0.1}, 0.5, "sum"),
            ("caption", "first", "description", {"acc": 1.0, "fmt": 0.1}, 0.5, "sum"),
        ],
    ),
    "ves_rft": ("see_think", False, [("answer", "first", "response", {"acc": 1.0, "fmt": 0.1}, 1.0, "sum")]),
    "car": (
        "see_think",
        True,
        [
            ("answer", "first", "reasoning", {"acc": 1.0, "fmt": 0.1}, 0.5, "sum"),
            (
                "caption",
                "first",
                "description",
                {"acc_vis": 1.0, "acc_vis@direct": -1.0, "fmt_vis": 0.1},
                0.5,
                "sum",
            ),
        ],
    ),
    "noisy_rollout": ("cot", False, [("answer", "first", "response", {"acc": 1.0, "fmt_cot": 0.1}, 1.0, "sum")]),
}


def test_every_configurable_preset_exists() -> None:
    assert tuple(PRESETS) == PRESET_NAMES == tuple(EXPECTED_PRESETS)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_preset_is_the_method_table(name: str) -> None:
    template, second_pass, streams = EXPECTED_PRESETS[name]
    preset = PRESETS[name]
    assert (preset.name, preset.template, preset.second_pass) == (name, template, second_pass)
    got = [(s.name, s.trajectory, s.tokens, dict(s.rewards), s.loss_weight, s.normalize) for s in preset.streams]
    assert got == streams
    beta = 0.04 if name == "visionary_r1" else 0.01  # its first
    assert all((s.kl_coef, s.kl_estimator) == (beta, "k3") for s in preset.streams)
    assert preset_from_config(ObjectiveConfig(preset=name)) == preset


def test_rewards_are_listed_once() -> None:
    assert PRESETS["vision_sr1"].rewards == ("acc", "fmt", "acc_vis", "fmt_vis")
    twice = (
        RewardStream("a", "first", "response", (("acc", 1.0),)),
        RewardStream("b", "first", "response", (("acc", 2.0),)),
    )
    assert Preset("x", "cot", twice).rewards == ("acc",)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_configuration_reaches_every_stream(name: str) -> None:
    config = ObjectiveConfig(preset=name, format_weight=0.25, kl_coef=0.5, kl_estimator="k1")
    preset = preset_from_config(config)
    for stream in preset.streams:
        own = name == "visionary_r1"  # whose KL has a schedule
        assert (stream.kl_coef, stream.kl_estimator) == (0.04 if own else 0.5, "k1")
        rewards = dict(stream.rewards)
        formats = {weight for component, weight in rewards.items() if component.startswith("fmt")}
        assert formats == {0.25} or "acc_judge" in rewards
        assert rewards.get("acc", 1.0) == (0.75 if name == "summed" else 1.0)


def test_format_weight_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"objective\.format_weight=1\.5"):
        preset_from_config(ObjectiveConfig(format_weight=1.5))


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ((), "no streams"),
        ((RewardStream("a", "first", "response", ()),), "no rewards"),
        ((RewardStream("a", "second", "description", (("acc", 1.0),)),), "no segment of the second pass"),
        ((RewardStream("a", "first", "response", (("acc", 1.0),)),) * 2, "repeat"),
    ],
)
def test_impossible_preset_is_refused(streams: tuple[RewardStream, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preset("x", "see_think", streams)


# ---------------------------------------------------------------- advantages
def test_group_scope_by_hand() -> None:
    # (2, 0, 1): mean 1, std sqrt((1 + 1 + 0) / 2) = 1.   (4, 0): mean 2, std sqrt(8).
    # The groups are interleaved, and their ids are not 0..G-1.
    got = group_advantages(f64(2, 4, 0, 0, 1), ids(7, 3, 7, 3, 7), EPS, "group")
    torch.testing.assert_close(got, f64(1, ROOT_HALF, -1, -ROOT_HALF, 0))


def test_batch_scope_by_hand() -> None:
    # (2, 4, 0, 0, 4): mean 2, squares 0 + 4 + 4 + 4 + 4 = 16, std sqrt(16 / 4) = 2; the groups do not matter.
    got = group_advantages(f64(2, 4, 0, 0, 4), ids(0, 1, 0, 1, 0), EPS, "batch")
    torch.testing.assert_close(got, f64(0, 1, -1, -1, 1))


def test_eps_is_added_to_the_standard_deviation() -> None:
    # (1, 0): deviation 1/2, std sqrt(1/2)
    got = group_advantages(f64(1, 0), ids(0, 0), 0.5, "group")
    torch.testing.assert_close(got, f64(0.5, -0.5) / (ROOT_HALF + 0.5))


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_equal_rewards_give_exactly_zero(scope: str) -> None:
    # The mean of three 0.1 differs from 0.1 in the last bit.
    got = group_advantages(f64(0.1, 0.1, 0.1), ids(0, 0, 0), 1e-30, scope)
    assert got.tolist() == [0.0, 0.0, 0.0]


def test_group_of_one_gives_zero_and_does_not_touch_others() -> None:
    got = group_advantages(f64(5, 1, 0), ids(0, 1, 1), EPS, "group")
    assert got[0] == 0
    torch.testing.assert_close(got[1:], f64(ROOT_HALF, -ROOT_HALF))


def test_missing_second_pass_counts_as_zero_reward() -> None:
    # (1, nothing): the same as (1, 0), not a group of one; a pair without a second pass earns 0
    alone = RolloutPair(0, Rollout("a", (1,), (2,), "x", (-0.1,), "stop", 0), None, None)
    earned = score_pair(alone, Prompt("p", "q", "1"), ["acc_vis"])["acc_vis"]
    got = group_advantages(f64(1, earned), ids(0, 0), EPS, "group")
    torch.testing.assert_close(got, f64(ROOT_HALF, -ROOT_HALF))


@settings(deadline=None, max_examples=50)
@given(
    rewards=st.lists(st.integers(0, 4), min_size=4, max_size=12),
    scale=st.floats(0.5, 4.0),
    shift=st.floats(-2.0, 2.0),
    seed=st.integers(0, 100),
)
def test_affine_and_order_invariance(rewards: list[int], scale: float, shift: float, seed: int) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    groups = torch.arange(len(rewards)) % 2
    base = group_advantages(values, groups, EPS, "group")
    torch.testing.assert_close(group_advantages(values * scale, groups, EPS, "group"), base)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(group_advantages(values[order], groups[order], EPS, "group"), base[order])
    # A shift may leave rounding noise in an equal group's std; eps of 1e-6, as configured, swallows it.
    shifted = group_advantages(values + shift, groups, 1e-6, "group")
    torch.testing.assert_close(shifted, group_advantages(values, groups, 1e-6, "group"), atol=1e-6, rtol=1e-6)
    for group in (0, 1):
        assert abs(float(base[groups == group].sum())) < 1e-9


def test_float32_in_float32_out() -> None:
    got = group_advantages(torch.tensor([1.0, 0.0]), ids(0, 0), EPS, "group")
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": ids(1, 0)}, "rewards: need floating"),
        ({"rewards": f64(1, math.nan)}, "not all are finite"),
        ({"group_ids": ids(0)}, "group_ids"),
        ({"group_ids": f64(0, 0)}, "group_ids"),
        ({"eps": 0.0}, "eps"),
        ({"scope": "prompt"}, "scope='prompt'"),
    ],
)
def test_bad_advantage_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"rewards": f64(1, 0), "group_ids": ids(0, 0), "eps": EPS, "scope": "group"} | change
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments)


SUMMED = RewardStream("s", "first", "response", (("acc", 1.0), ("fmt", 0.5)))
DECOUPLED = replace(SUMMED, normalize="per_component")


def test_sum_and_per_component_by_hand() -> None:
    rewards = {"acc": f64(1, 0, 0), "fmt": f64(0, 2, 0), "unused": f64(9, 9, 9)}
    groups = ids(0, 0, 0)
    # sum: (1, 1, 0), mean 2/3, std sqrt((1/9 + 1/9 + 4/9) / 2) = 1/sqrt(3)
    third = 1 / math.sqrt(3)
    torch.testing.assert_close(stream_advantages(SUMMED, rewards, groups, EPS), f64(third, third, -2 * third))
    # each component alone is (2, -1, -1)/sqrt(3), in its own order: (2 - 1/2, -1 + 1, -1 - 1/2)/sqrt(3)
    torch.testing.assert_close(stream_advantages(DECOUPLED, rewards, groups, EPS), f64(1.5 * third, 0, -1.5 * third))


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_gdpo_of_one_component_is_the_sum(scope: str) -> None:
    single = RewardStream("s", "first", "response", (("acc", 1.0),), scope=scope)
    rewards = {"acc": f64(1, 0, 1, 0.5, 0)}
    groups = ids(0, 0, 0, 1, 1)
    summed = stream_advantages(single, rewards, groups, EPS)
    decoupled = stream_advantages(replace(single, normalize="per_component"), rewards, groups, EPS)
    assert torch.equal(summed, decoupled)
    assert summed.abs().max() > 0.5


def test_bad_components_are_named() -> None:
    with pytest.raises(ValueError, match=r"stream 's' needs \['fmt'\]"):
        stream_advantages(SUMMED, {"acc": f64(1, 0)}, ids(0, 0), EPS)
    for bad in (ids(1, 0), f64(1)):
        with pytest.raises(ValueError, match=r"component_rewards\['fmt'\]"):
            stream_advantages(SUMMED, {"acc": f64(1, 0), "fmt": bad}, ids(0, 0), EPS)


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 10, 1 / 10, 0, 1 / 10]),  # 2 + 5 + 0 + 3 tokens
        ("sequence_mean", [1 / 8, 1 / 20, 0, 1 / 12]),  # 4 rollouts, the empty one included
        ("sequence_sum", [1 / 4, 1 / 4, 0, 1 / 4]),
        ("constant", [1 / 64, 1 / 64, 0, 1 / 64]),
    ],
)
def test_weights_by_hand(aggregation: str, expected: list[float]) -> None:
    lengths, constant = ids(2, 5, 0, 3), 16 if aggregation == "constant" else None
    torch.testing.assert_close(token_weights(lengths, aggregation, constant), torch.tensor(expected))
    both = token_weights(torch.stack([lengths, torch.zeros_like(lengths)]), aggregation, constant)
    torch.testing.assert_close(both, torch.tensor([expected, [0.0] * 4]))  # a stream without tokens divides nothing


def test_bad_token_counts_are_named() -> None:
    for bad, message in (
        (f64(1), "int32 or int64"),
        (ids(1, -1), "negative"),
        (ids(1).reshape(1, 1, 1), r"\(1, 1, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            token_weights(bad, "token_mean")
    with pytest.raises(ValueError, match="no rollout"):
        token_weights(torch.zeros(0, dtype=torch.int64), "token_mean")
    with pytest.raises(ValueError, match="aggregation='mean'"):
        token_weights(ids(1), "mean")
    for aggregation, constant in (("constant", None), ("constant", 0), ("token_mean", 8)):
        with pytest.raises(ValueError, match=f"aggregation='{aggregation}', constant={constant}"):
            token_weights(ids(1), aggregation, constant)
