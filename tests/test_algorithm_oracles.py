"""Every algorithm by its switches against what TRL and verl compute, stream by stream: advantages, losses and gradients
of the logits, to 1e-6. `algorithm_oracles.py` has theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sr1.kernels import fused_stream_loss, is_fused
from megatron_sr1.objective import stream_advantages, stream_loss, token_weights
from megatron_sr1.types import Clip, LossInputs, RewardStream
from tests import algorithm_oracles as theirs

GROUPS, SIZE, LONGEST, VOCAB = 3, 4, 11, 13
RESPONSES = GROUPS * SIZE
LOW, HIGH, DUAL, CONSTANT = 0.2, 0.28, 3.0, 16
CLOSE = {"rtol": 1e-6, "atol": 1e-9}  # token weights are float32
STREAM = RewardStream("s", "first", "response", (("acc", 1.0),), kl_coef=0.0, clip=Clip(LOW, HIGH))


# ---------------------------------------------------------------- advantages
@pytest.fixture(params=range(3))
def draw(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(request.param)


def rewards_of(draw: torch.Generator) -> Tensor:
    return torch.rand(RESPONSES, generator=draw, dtype=torch.float64) * 2 - 0.5


def at_the_end(rewards: Tensor, mask: Tensor) -> Tensor:
    """[B, L]: the reward at each response's last token, where verl puts it."""
    last = mask.sum(1).long() - 1
    return torch.zeros_like(mask).index_put((torch.arange(len(mask)), last), rewards)


def ours(measured: dict[str, Tensor], eps: float, kl: Tensor | None = None, **switches: Any) -> Tensor:
    groups = torch.arange(GROUPS).repeat_interleave(SIZE)
    return stream_advantages(replace(STREAM, **switches), measured, groups, eps, kl)


def masks(draw: torch.Generator, equal: bool = False) -> Tensor:
    lengths = torch.randint(1, LONGEST + 1, (RESPONSES,), generator=draw)
    lengths = torch.full_like(lengths, LONGEST) if equal else lengths
    return (torch.arange(LONGEST) < lengths[:, None]).double()


def test_group_advantages_are_theirs(draw: torch.Generator) -> None:
    rewards, mask = rewards_of(draw), masks(draw)
    acc, outcome = {"acc": rewards}, at_the_end(rewards, mask)
    for found, expected in (
        (ours(acc, theirs.TRL_EPS), theirs.trl_grpo(rewards, SIZE, "group")),
        (ours(acc, theirs.VERL_EPS), theirs.verl_grpo(outcome, SIZE, by_std=True)),
        (ours(acc, 1.0, advantage="centred"), theirs.trl_grpo(rewards, SIZE, "none")),
        (ours(acc, 1.0, advantage="centred"), theirs.verl_grpo(outcome, SIZE, by_std=False)),
        (ours(acc, 1.0, advantage="leave_one_out"), theirs.trl_rloo(rewards, SIZE)),
        (ours(acc, 1.0, advantage="leave_one_out"), theirs.verl_rloo(outcome, SIZE)),
        (ours(acc, theirs.TRL_EPS, advantage="reward_std"), theirs.trl_grpo(rewards, SIZE, "batch")),
    ):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_gdpo_is_theirs_but_for_one_factor_of_the_batch(draw: torch.Generator) -> None:
    both = {"acc": rewards_of(draw), "fmt": rewards_of(draw)}
    weights = (("acc", 1.0), ("fmt", 0.1))
    found = ours(both, theirs.TRL_EPS, rewards=weights, normalize="per_component")
    expected = theirs.trl_gdpo(torch.stack(list(both.values()), 1), torch.tensor([1.0, 0.1]).double(), SIZE)
    torch.testing.assert_close(found / (found.std() + theirs.TRL_EPS), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("equal", [True, False])
def test_whitening_is_verls_where_responses_are_equally_long(draw: torch.Generator, equal: bool) -> None:
    """verl weighs each response by its tokens there; ours counts responses, so no length shifts an advantage."""
    rewards, mask = rewards_of(draw), masks(draw, equal)
    acc, outcome = {"acc": rewards}, at_the_end(rewards, mask)
    # n - 1 counts responses with us and tokens there
    factor = math.sqrt((RESPONSES - 1) / RESPONSES) / math.sqrt((mask.sum().item() - 1) / mask.sum().item())
    for found, expected in (
        (ours(acc, 1e-9, advantage="batch_std"), theirs.verl_reinforce_plus_plus_baseline(outcome, mask, SIZE)),
        (ours(acc, 1e-9, scope="batch"), theirs.verl_reinforce_plus_plus(outcome, mask)),
    ):
        near = torch.allclose(found[:, None] * mask / factor, expected, rtol=1e-6, atol=1e-7)
        assert near == equal


@pytest.mark.parametrize("kind", ["z_score", "centred", "leave_one_out"])
def test_kl_in_the_reward_is_theirs(draw: torch.Generator, kind: str) -> None:
    """TRL's RLOO takes the sum off; verl subtracts at every token, then adds them up."""
    rewards, mask, beta = rewards_of(draw), masks(draw), 0.05
    old, ref = (-3 * torch.rand(RESPONSES, LONGEST, generator=draw, dtype=torch.float64) for _ in range(2))
    summed = ((old - ref) * mask).sum(1)
    how = {"advantage": kind, "kl_in": "reward", "kl_coef": beta, "kl_estimator": "k1"}
    found = ours({"acc": rewards}, theirs.VERL_EPS, summed, **how)
    of_tokens = at_the_end(rewards, mask) - beta * theirs.kl_terms(old, ref)["k1"] * mask
    if kind == "leave_one_out":
        torch.testing.assert_close(found, theirs.trl_rloo(rewards, SIZE, beta, summed), **CLOSE)
        torch.testing.assert_close(found, theirs.verl_rloo(of_tokens, SIZE), **CLOSE)
    else:
        torch.testing.assert_close(found, theirs.verl_grpo(of_tokens, SIZE, by_std=kind == "z_score"), **CLOSE)
    assert not torch.allclose(found, ours({"acc": rewards}, theirs.VERL_EPS, advantage=kind), rtol=1e-3)


def test_only_k1_in_the_reward_has_the_gradient_of_the_kl_divergence() -> None:
    """Summed by hand over a token's five values: why the other estimators are refused there. Near the reference what
    they pull with vanishes faster than the KL divergence's own gradient."""
    reference = torch.tensor([0.5, -0.3, 0.1, 0.9, -1.0], dtype=torch.float64).log_softmax(0)
    direction = torch.tensor([1.0, -2.0, 0.5, 0.3, 0.2], dtype=torch.float64)
    pulls: dict[str, list[float]] = {"k1": [], "k2": [], "k3": []}
    for far in (1e-2, 1e-4):
        logits = (reference + far * direction).requires_grad_()
        policy = logits.log_softmax(0)
        (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
        for name, penalty in theirs.kl_terms(policy.detach(), reference).items():
            (found,) = torch.autograd.grad((policy.exp().detach() * penalty * policy).sum(), logits, retain_graph=True)
            pulls[name].append((found.norm() / exact.norm()).item())
            assert name != "k1" or torch.allclose(found, exact, rtol=1e-9, atol=1e-15)
    assert pulls["k1"] == pytest.approx([1.0, 1.0]) and max(pulls["k2"] + pulls["k3"]) < 0.02
    assert pulls["k2"][1] < 1e-3 and pulls["k3"][1] < 1e-3


def test_a_kl_that_is_missing_or_no_number_is_named() -> None:
    rewards = {"acc": torch.ones(RESPONSES)}
    how = {"kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k1"}
    for kl in (None, torch.zeros(3), torch.full((RESPONSES,), math.nan)):
        with pytest.raises(ValueError, match=r"kl: stream 's' has kl_in='reward'.*finite number for each of 12"):
            ours(rewards, 1.0, kl, **how)
    with pytest.raises(ValueError, match="needs one sum of rewards"):
        ours(rewards, 1.0, torch.zeros(RESPONSES), normalize="per_component", **how)


# ---------------------------------------------------------------- losses
_Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of new, old, mask, advantages [B, 1]
GSPO = {"ratio": "sequence", "aggregation": "sequence_mean"}
# name -> (switches of a stream, theirs)
SURROGATES: dict[str, tuple[dict[str, Any], _Surrogate]] = {
    "trl clip higher": ({}, lambda n, o, m, a: theirs.trl_ppo(n, o, a, LOW, HIGH, None)),
    "trl two-sided": ({"clip": Clip(LOW, HIGH, DUAL)}, lambda n, o, m, a: theirs.trl_ppo(n, o, a, LOW, HIGH, DUAL)),
    "verl dual clip": ({"clip": Clip(LOW, HIGH, DUAL)}, lambda n, o, m, a: theirs.verl_ppo(n, o, a, LOW, HIGH, DUAL)),
    "trl gspo": (GSPO, lambda n, o, m, a: theirs.trl_gspo(n, o, m, a, LOW, HIGH)),
    "verl gspo": (GSPO, lambda n, o, m, a: theirs.verl_gspo(n, o, m, a, LOW, HIGH)),
    "trl cispo": ({"surrogate": "cispo", "clip": Clip(1.0, 4.0)}, lambda n, o, m, a: theirs.trl_cispo(n, o, a, 5.0)),
    "verl cispo": ({"surrogate": "cispo"}, lambda n, o, m, a: theirs.verl_cispo(n, o, a, LOW, HIGH)),
    "sapo": ({"surrogate": "sapo", "aggregation": "sequence_mean"}, lambda n, o, m, a: theirs.sapo(n, o, a)),
}
AGGREGATIONS = theirs.aggregations(CONSTANT)


class Padded:
    """Responses of two streams: one credits all of them, one a part, and each has its own advantages."""

    def __init__(self, draw: torch.Generator, spread: float = 0.6) -> None:
        shape = (RESPONSES, LONGEST, VOCAB)
        self.logits = torch.randn(shape, generator=draw, dtype=torch.float64)
        self.ids = torch.randint(0, VOCAB, shape[:2], generator=draw)
        whole = masks(draw)
        part = whole * (torch.arange(LONGEST) % 3 != 1)  # the first token too, so every response has one
        self.masks = (whole, part)
        drawn = self.scores(self.logits)
        self.old, self.ref = (
            drawn + spread * torch.randn(shape[:2], generator=draw, dtype=torch.float64) for _ in range(2)
        )
        self.advantages = torch.randn(2, RESPONSES, generator=draw, dtype=torch.float64)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(2, self.ids[..., None]).squeeze(2)

    def their_loss(self, logits: Tensor, stream: RewardStream, index: int, surrogate: _Surrogate) -> Tensor:
        new, mask = self.scores(logits), self.masks[index]
        aggregate = AGGREGATIONS[stream.aggregation]
        policy = surrogate(new, self.old, mask, self.advantages[index][:, None]).expand_as(mask)
        loss = stream.loss_weight * aggregate(policy, mask)
        loss = loss + stream.kl_coef * aggregate(theirs.kl_terms(new, self.ref)[stream.kl_estimator], mask)
        return loss - stream.entropy_coef * aggregate(theirs.entropies(logits), mask)

    def our_inputs(self, logits: Tensor, streams: tuple[RewardStream, ...]) -> LossInputs:
        """One row of all responses' tokens."""
        rows = self.masks[0].bool()  # [B, L] of the R tokens
        sequence = torch.arange(RESPONSES)[:, None].expand_as(rows)[rows]
        weights = []
        for mask, stream in zip(self.masks, streams, strict=True):
            constant = CONSTANT if stream.aggregation == "constant" else None
            of_response = token_weights(mask.sum(1).long(), stream.aggregation, constant).double()
            weights.append(of_response[sequence] * mask[rows])
        log_p = logits.log_softmax(-1)
        return LossInputs(
            self.scores(logits)[rows],
            self.old[rows],
            self.ref[rows],
            self.advantages[:, sequence],
            torch.stack(weights),
            streams,
            sequence,
            entropy=-(log_p.exp() * log_p).sum(-1)[rows],
        )

    def compare(self, streams: tuple[RewardStream, ...], surrogates: tuple[_Surrogate, ...]) -> dict[str, Tensor]:
        """Both losses, ours by every way to it; returns our metrics."""
        leaf = self.logits.clone().requires_grad_()
        parts = zip(streams, (0, 1), surrogates, strict=True)
        expected = torch.stack([self.their_loss(leaf, *part) for part in parts]).sum()
        (gradient,) = torch.autograd.grad(expected, leaf)
        ways = (stream_loss, fused_stream_loss) if all(is_fused(stream) for stream in streams) else (stream_loss,)
        for way in ways:
            leaf = self.logits.clone().requires_grad_()
            loss, metrics = way(self.our_inputs(leaf, streams))
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)  # of terms that cancel
            torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], gradient, rtol=1e-6, atol=1e-8)
        return metrics


@pytest.mark.parametrize("second", SURROGATES)
@pytest.mark.parametrize("first", ["trl clip higher", "verl gspo"])
def test_a_surrogate_is_theirs_in_each_of_two_streams(draw: torch.Generator, first: str, second: str) -> None:
    terms = {"kl_coef": 0.1, "entropy_coef": 0.01}
    streams = (
        replace(STREAM, name="a", loss_weight=0.7, **SURROGATES[first][0]),
        replace(STREAM, name="b", loss_weight=0.4, **terms, **SURROGATES[second][0]),
    )
    Padded(draw).compare(streams, (SURROGATES[first][1], SURROGATES[second][1]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_aggregations_kl_and_entropy_are_theirs(draw: torch.Generator, aggregation: str, estimator: str) -> None:
    name, surrogate = SURROGATES["verl dual clip"]
    how = {"aggregation": aggregation, "kl_estimator": estimator, "kl_coef": 0.2, **name}
    streams = (
        replace(STREAM, name="a", loss_weight=0.5, entropy_coef=0.03, **how),
        replace(STREAM, name="b", entropy_coef=-0.02, **how),  # which pushes entropy down
    )
    padded = Padded(draw)
    metrics = padded.compare(streams, (surrogate, surrogate))
    for stream, mask in zip(streams, padded.masks, strict=True):
        mean = AGGREGATIONS[aggregation](theirs.entropies(padded.logits), mask)
        found = metrics[f"loss/{stream.name}/entropy_bonus"].item()
        assert found == pytest.approx(stream.entropy_coef * mean.item(), rel=1e-6)


def test_a_stream_without_a_bonus_has_no_metric_and_needs_no_entropy(draw: torch.Generator) -> None:
    padded = Padded(draw)
    both = (replace(STREAM, name="a"), replace(STREAM, name="b", entropy_coef=0.1))
    inputs = padded.our_inputs(padded.logits, both)
    names = {name for name in stream_loss(inputs)[1] if "entropy" in name}
    assert names == {"loss/b/entropy_bonus"} == {name for name in fused_stream_loss(inputs)[1] if "entropy" in name}
    for way in (stream_loss, fused_stream_loss):
        with pytest.raises(ValueError, match=r"entropy: None, but streams \['b'\] have an entropy_coef"):
            way(replace(inputs, entropy=None))
        with pytest.raises(ValueError, match="entropy: shape"):
            way(replace(inputs, entropy=torch.zeros(3)))
        assert "loss/a/entropy_bonus" not in way(replace(inputs, entropy=None, streams=(both[0],) * 2))[1]


def test_a_kl_in_the_reward_is_no_term_of_the_loss_and_still_measured(draw: torch.Generator) -> None:
    padded = Padded(draw)
    streams = tuple(replace(STREAM, name=name, kl_coef=0.3, kl_estimator="k1", kl_in="reward") for name in "ab")
    surrogate = SURROGATES["trl clip higher"][1]
    plain = tuple(replace(stream, kl_coef=0.0, kl_in="loss") for stream in streams)
    expected = sum(padded.their_loss(padded.logits, stream, index, surrogate) for index, stream in enumerate(plain))
    inputs = padded.our_inputs(padded.logits, streams)
    for way in (stream_loss, fused_stream_loss):
        loss, metrics = way(inputs)
        assert loss.item() == pytest.approx(float(expected), rel=1e-6)
        kl = theirs.kl_terms(padded.scores(padded.logits), padded.ref)["k1"]
        mean = AGGREGATIONS["token_mean"](kl, padded.masks[0])
        assert metrics["loss/a/kl"].item() == pytest.approx(mean.item(), rel=1e-6)
        way(replace(inputs, ref_logprobs=None))  # none is needed for the loss
