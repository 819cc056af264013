"""Importance weights against the printed formulas, and their effect on the loss's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sr1.objective import Mismatch, importance_weights, stream_loss, token_kinds
from megatron_sr1.types import Clip, LossInputs, RewardStream

RATIOS = [0.1, 0.5, 1.0, 1.9, 2.1, 40.0]
GENERATOR = torch.full((6,), -3.0)
TRAINER = GENERATOR + torch.tensor(RATIOS).log()
ALONE = torch.arange(6)


def weights(mismatch: Mismatch, sequences: torch.Tensor = ALONE) -> tuple[list[float], list[bool]]:
    values, bounded = importance_weights(TRAINER, GENERATOR, sequences, mismatch)
    return values.tolist(), bounded.tolist()


def test_none_leaves_every_token_alone() -> None:
    assert weights(Mismatch()) == ([1.0] * 6, [False] * 6)


def test_truncation_follows_tis() -> None:
    """Yao et al. 2025: min(pi_trainer / pi_generator, C); small ratios stay small."""
    values, bounded = weights(Mismatch("truncate", high=2.0))
    assert values == pytest.approx([0.1, 0.5, 1.0, 1.9, 2.0, 2.0], rel=1e-5)
    assert bounded == [False, False, False, False, True, True]


def test_masking_follows_icepop() -> None:
    """IcePop's M(k) = k inside [alpha, beta], else 0."""
    values, bounded = weights(Mismatch("mask", low=0.4, high=5.0))
    assert values == pytest.approx([0.0, 0.5, 1.0, 1.9, 2.1, 0.0], rel=1e-5)
    assert bounded == [True, False, False, False, False, True]


def test_a_sequence_has_one_weight_the_product_of_its_ratios() -> None:
    sequences = torch.tensor([0, 0, 2, 2, 2, 0])
    values, _ = weights(Mismatch("truncate", "sequence", high=3.0), sequences)
    first, second = 0.1 * 0.5 * 40.0, 1.0 * 1.9 * 2.1
    assert values == pytest.approx([first, first, 3.0, 3.0, 3.0, first], rel=1e-4)
    assert second > 3.0
    values, bounded = weights(Mismatch("mask", "sequence", low=0.5, high=3.0), sequences)
    assert values == pytest.approx([first, first, 0.0, 0.0, 0.0, first], rel=1e-4)
    assert bounded == [False, False, True, True, True, False]


def test_hopeless_gaps_stay_finite() -> None:
    trainer, generator = torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4])
    for mismatch in (Mismatch("truncate"), Mismatch("mask"), Mismatch("truncate", "sequence", high=1e30)):
        values, _ = importance_weights(trainer, generator, torch.arange(2), mismatch)
        assert torch.isfinite(values).all()


def test_an_empty_micro_batch_has_no_weights() -> None:
    nothing = torch.empty(0)
    values, bounded = importance_weights(nothing, nothing, nothing.long(), Mismatch("mask", "sequence"))
    assert values.shape == bounded.shape == (0,)


@pytest.mark.parametrize("bounds", [(-0.1, 2.0), (2.0, 2.0), (3.0, 2.0)])
def test_bounds_that_leave_no_room_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low < high"):
        Mismatch("mask", "token", *bounds)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        importance_weights(TRAINER, GENERATOR[:5], ALONE, Mismatch("truncate"))


# ---------------------------------------------------------------- inside the loss
def loss_gradient(advantages: torch.Tensor, old: torch.Tensor | None, kl_coef: float) -> torch.Tensor:
    trainer = TRAINER.clone().requires_grad_()
    how = {"loss_weight": 0.5, "kl_coef": kl_coef, "clip": Clip(dual=3.0)}
    stream = RewardStream("s", "first", "response", (("acc", 1.0),), **how)
    inputs = LossInputs(trainer, old, GENERATOR, advantages[None], torch.full((1, 6), 1 / 6), (stream,))
    stream_loss(inputs)[0].backward()
    assert trainer.grad is not None
    return trainer.grad


@pytest.mark.parametrize("mismatch", [Mismatch("truncate"), Mismatch("mask"), Mismatch("truncate", "sequence")])
@pytest.mark.parametrize("old", [None, TRAINER - 0.3])
def test_the_weight_scales_each_tokens_policy_gradient_and_is_a_constant(
    mismatch: Mismatch, old: torch.Tensor | None
) -> None:
    """Also where PPO's or the dual clip holds a token, and never the KL term."""
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, -1.0])
    values, _ = importance_weights(TRAINER.clone().requires_grad_(), GENERATOR, ALONE // 3, mismatch)
    assert not values.requires_grad
    plain = loss_gradient(advantages, old, 0.0)
    assert torch.allclose(loss_gradient(advantages * values, old, 0.0), plain * values, rtol=1e-5, atol=1e-8)
    kl = loss_gradient(torch.zeros(6), old, 0.1)
    assert torch.allclose(loss_gradient(advantages * values, old, 0.1), plain * values + kl, rtol=1e-5, atol=1e-7)


def test_truncated_weights_make_an_off_policy_gradient_unbiased() -> None:
    """The expectation over the generator's draws, summed by hand over four tokens, is the trainer's own gradient."""
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    trainer = logits.log_softmax(0)
    generator = torch.tensor([0.25, 0.3, 0.2, 0.25], dtype=torch.float64).log()
    reward = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    values, bounded = importance_weights(trainer, generator, torch.arange(4), Mismatch("truncate", high=10.0))
    assert not bounded.any()
    (estimated,) = torch.autograd.grad((generator.exp() * values * reward * trainer).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((trainer.exp() * reward).sum(), logits)
    assert torch.allclose(estimated, exact, atol=1e-12)


# ---------------------------------------------------------------- where a gap lies
@given(st.lists(st.tuples(st.integers(-1, 5000), st.integers(0, 5000)), min_size=1, max_size=30))
def test_every_token_has_one_place_and_one_position(tokens: list[tuple[int, int]]) -> None:
    distance, offset = (torch.tensor(column, dtype=torch.float32) for column in zip(*tokens, strict=True))
    kinds = token_kinds(distance, offset)
    places = torch.stack([kinds[name] for name in ("text", "near_image", "far_image")])
    positions = torch.stack([mask for name, mask in kinds.items() if name.startswith("position_")])
    assert places.sum(0).tolist() == positions.sum(0).tolist() == [1] * len(tokens)


def test_kinds_by_hand() -> None:
    kinds = token_kinds(torch.tensor([-1.0, 1.0, 64.0, 65.0]), torch.tensor([0, 63, 64, 2000]))
    named = [{name for name, mask in kinds.items() if mask[token]} for token in range(4)]
    assert named == [
        {"text", "position_0"},
        {"near_image", "position_0"},
        {"near_image", "position_64"},
        {"far_image", "position_1024"},
    ]
    assert math.isclose(sum(mask.sum().item() for mask in kinds.values()), 8)
