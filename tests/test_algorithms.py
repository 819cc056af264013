"""The algorithms that a stream may choose, against their papers' formulas, written out over whole responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sr1.import_path import UserCodeError
from megatron_sr1.kernels import fused_stream_loss, is_fused
from megatron_sr1.objective import OwnLoss, group_advantages, stream_advantages, stream_loss, token_weights
from megatron_sr1.types import Clip, LossInputs, RewardStream

LENGTHS = torch.tensor([5, 1, 9, 3])
LOW, HIGH, DUAL = 0.2, 0.28, 3.0
STREAM = RewardStream("s", "first", "response", (("acc", 1.0),), loss_weight=0.7, kl_coef=0.0, clip=Clip(LOW, HIGH))


# ---------------------------------------------------------------- advantages
def leave_one_out(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """RLOO: the mean of the others is the baseline; alone there is none to be better than."""
    found = []
    for index, reward in enumerate(rewards):
        others = [rewards[j] for j in range(len(rewards)) if groups[j] == groups[index] and j != index]
        found.append(reward - sum(others) / len(others) if others else 0.0)
    return np.array(found)


def centred(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Dr.GRPO."""
    return np.array([reward - rewards[groups == group].mean() for reward, group in zip(rewards, groups, strict=True)])


def batch_std(rewards: np.ndarray, groups: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """REINFORCE++ with baseline: centred by groups, whitened over the batch."""
    differences = centred(rewards, groups)
    return (differences - differences.mean()) / (differences.std(ddof=1) + eps)


def reward_std(rewards: np.ndarray, groups: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """Lite PPO: centred by groups, divided by the spread of the batch's rewards as they are."""
    return centred(rewards, groups) / (rewards.std(ddof=1) + eps)


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "leave_one_out": leave_one_out,
    "centred": centred,
    "batch_std": batch_std,
    "reward_std": reward_std,
}


@pytest.mark.parametrize("kind", FORMULAS)
@settings(deadline=None, max_examples=60)
@given(
    rewards=st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1, -2.5]), min_size=2, max_size=24),
    num_groups=st.integers(1, 4),
)
def test_advantages_are_the_formulas(kind: str, rewards: list[float], num_groups: int) -> None:
    values, groups = np.array(rewards), np.arange(len(rewards)) % num_groups
    expected = FORMULAS[kind](values, groups)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        given_rewards = torch.tensor(values, dtype=dtype)
        found = group_advantages(given_rewards, torch.tensor(groups), 1e-6, "group", kind)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance * 3)


@pytest.mark.parametrize("kind", ["centred", "leave_one_out"])
def test_per_component_is_the_weighted_sum_of_each(kind: str) -> None:
    """Both are linear, so that for them nothing changes; a z-score is not."""
    rewards = {"acc": torch.tensor([1.0, 0.0, 1.0, 0.0]), "fmt": torch.tensor([0.0, 0.0, 1.0, 1.0])}
    stream = replace(STREAM, rewards=(("acc", 1.0), ("fmt", 0.5)), advantage=kind)
    groups = torch.tensor([0, 0, 1, 1])
    one, other = (
        stream_advantages(replace(stream, normalize=how), rewards, groups, 1e-6) for how in ("sum", "per_component")
    )
    torch.testing.assert_close(one, other)


def test_equal_rewards_are_no_advantage_of_any_kind() -> None:
    rewards, groups = torch.tensor([0.1, 0.1, 0.1, 0.7]), torch.tensor([0, 0, 0, 1])
    for kind in ("z_score", *FORMULAS):
        assert not group_advantages(rewards, groups, 1e-6, "group", kind).any()
    for kind in ("batch_std", "reward_std"):
        with pytest.raises(ValueError, match=f"kind='{kind}', scope='batch'.*with scope"):
            group_advantages(rewards, groups, 1e-6, "batch", kind)
    with pytest.raises(ValueError, match="kind='std'"):
        group_advantages(rewards, groups, 1e-6, "group", "std")


# ---------------------------------------------------------------- surrogates
def gspo(logp: list[Tensor], old: list[Tensor], advantages: list[float]) -> Tensor:
    """The mean over responses of min(s A, clip(s) A), s the geometric mean of a response's ratios."""
    terms = []
    for new, before, advantage in zip(logp, old, advantages, strict=True):
        s = (new - before).mean().exp()
        terms.append(-torch.minimum(s * advantage, s.clamp(1 - LOW, 1 + HIGH) * advantage))
    return torch.stack(terms).mean()


def cispo(logp: list[Tensor], old: list[Tensor], advantages: list[float]) -> Tensor:
    """The mean over responses of the mean over tokens of sg(clip(r)) A log pi."""
    terms = []
    for new, before, advantage in zip(logp, old, advantages, strict=True):
        ratio = (new - before).exp().clamp(1 - LOW, 1 + HIGH).detach()
        terms.append((-ratio * advantage * new).mean())
    return torch.stack(terms).mean()


def sapo(logp: list[Tensor], old: list[Tensor], advantages: list[float]) -> Tensor:
    """The mean over responses of the mean over tokens of the gated ratio times A."""
    terms = []
    for new, before, advantage in zip(logp, old, advantages, strict=True):
        tau = 1.0 if advantage > 0 else 1.05
        terms.append((-advantage * 4 / tau / (1 + (-tau * ((new - before).exp() - 1)).exp())).mean())
    return torch.stack(terms).mean()


SURROGATES = {
    "gspo": (gspo, {"ratio": "sequence"}),
    "cispo": (cispo, {"surrogate": "cispo"}),
    "sapo": (sapo, {"surrogate": "sapo"}),
}


def drawn(seed: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of old and new policy, and an advantage for each response, float64."""
    generator = torch.Generator().manual_seed(seed)
    num = int(LENGTHS.sum())
    old = -3 * torch.rand(num, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(num, generator=generator, dtype=torch.float64)
    return old, new, torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_are_the_formulas(name: str, spread: float, seed: int) -> None:
    formula, switches = SURROGATES[name]
    old, new, advantages = drawn(seed, spread)
    theirs = new.clone().requires_grad_()
    parts = [list(values.split(LENGTHS.tolist())) for values in (theirs, old)]
    expected = 0.7 * formula(*parts, advantages.tolist())
    expected.backward()

    ours = new.clone().requires_grad_()
    row_sequence = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    weights = token_weights(LENGTHS, "sequence_mean").double()
    loss, metrics = stream_loss(
        LossInputs(
            ours,
            old,
            None,
            advantages[row_sequence][None],
            weights[row_sequence][None],
            (replace(STREAM, **switches),),
            row_sequence,
        )
    )
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # the weights are float32
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    assert metrics["loss/s/weight"].item() == pytest.approx(1.0, rel=1e-6)
    clipped = metrics["loss/s/clip_fraction"].item()
    assert clipped == 0.0 if name == "sapo" or spread == 0.0 else clipped >= 0.0


def test_a_ratio_of_sequences_is_of_the_tokens_that_the_stream_credits() -> None:
    old, new, _ = drawn(0, 0.5)
    row_sequence = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    mask = torch.ones(len(old), dtype=torch.float64)
    mask[[0, 1, 7]] = 0.0
    stream = replace(STREAM, ratio="sequence", clip=Clip(0.999, 999.0))
    inputs = LossInputs(
        new, old, None, torch.ones(1, len(old)).double(), mask[None] / mask.sum(), (stream,), row_sequence
    )
    _, metrics = stream_loss(inputs)
    ratios = [
        (new - old)[(row_sequence == index) & (mask > 0)].mean().exp() * ((row_sequence == index) & (mask > 0)).sum()
        for index in range(len(LENGTHS))
    ]
    assert metrics["loss/s/ratio_mean"].item() == pytest.approx((sum(ratios) / mask.sum()).item())
    with pytest.raises(ValueError, match="row_sequence: None, but stream 's'"):
        stream_loss(replace(inputs, row_sequence=None))
    empty = torch.zeros(0, dtype=torch.float64)
    nothing = LossInputs(empty, empty, None, empty[None], empty[None], (stream,), torch.zeros(0, dtype=torch.int64))
    assert stream_loss(nothing)[0] == 0.0


def test_the_fused_loss_refuses_what_it_does_not_compute() -> None:
    old, new, _ = drawn(0, 0.1)
    for switches in ({"ratio": "sequence"}, {"surrogate": "cispo"}, {"surrogate": "sapo"}):
        stream = replace(STREAM, **switches)
        inputs = LossInputs(new, old, None, torch.ones(1, len(old)), torch.ones(1, len(old)), (stream,))
        assert not is_fused(stream)
        with pytest.raises(ValueError, match="'s' has surrogate="):
            fused_stream_loss(inputs)
    assert is_fused(STREAM)


# ---------------------------------------------------------------- a loss of a user's own
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("1 / 0", r"failed at .*own.py:2 in f: ZeroDivisionError"),
        ("return None", "returned NoneType: it must be"),
        ("return inputs.trainer_logprobs.sum()", "returned Tensor: it must be"),
        ("return 1.0, {}", "returned 1.0 as its loss"),
        ("return inputs.old_logprobs.sum(), {}", "with a gradient"),
        ("return inputs.trainer_logprobs, {}", "as its loss: it must be a scalar"),
        ("return inputs.trainer_logprobs.sum(), {1: 2.0}", "the metric 1"),
        ("return inputs.trainer_logprobs.sum(), {'a': 'b'}", "the metric 'a': 'b'"),
        ("return inputs.trainer_logprobs.sum(), {'a': inputs.old_logprobs}", "it must be a scalar"),
    ],
)
def test_what_a_loss_returns_is_looked_at(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "own.py").write_text(f"def f(inputs):\n    {body}\n")
    trainer = torch.zeros(2, requires_grad=True)
    inputs = LossInputs(trainer, torch.zeros(2), None, torch.zeros(1, 2), torch.zeros(1, 2), (STREAM,))
    with pytest.raises(UserCodeError, match=words):
        OwnLoss(f"{tmp_path / 'own.py'}:f")(inputs)


def test_metrics_of_a_loss_are_named_as_ours_are(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def f(inputs):\n    return inputs.trainer_logprobs.sum(), {'a': 2, 'b/c': inputs.old_logprobs.sum()}\n"
    )
    trainer = torch.ones(2, requires_grad=True)
    loss, metrics = OwnLoss(f"{tmp_path / 'own.py'}:f")(
        LossInputs(trainer, torch.ones(2), None, torch.zeros(1, 2), torch.zeros(1, 2), (STREAM,))
    )
    assert loss.item() == 2.0 and {name: value.item() for name, value in metrics.items()} == {
        "loss/a": 2.0,
        "loss/b/c": 2.0,
    }
    with pytest.raises(ValueError, match="must be a function of LossInputs"):
        OwnLoss("math:pi")
