"""linear_logprob beside other people's: Liger's fallback functions, tensor-parallel too, and torch's own loss.

Each is held against the definition in float64, within a bound of its own. Two float32 results of different sums differ
by both errors, which depend on the CPU; one small bound on their difference would hold on some CPUs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
    _FusedLinearPPOFallbackFunction,
    _TensorParallelFusedLinearPPOFallbackFunction,
)
from torch import Tensor
from torch.nn import functional

from megatron_sr1.kernels import IGNORE_INDEX, linear_logprob
from megatron_sr1.kernels.linear_logprob import chunked
from megatron_sr1.types import LogProbs
from tests.logprob_cases import assert_relative, backward_both, dense_reference, make_exact_inputs, make_inputs
from tests.ranks import run_ranks

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Bound:
    """Allowed error in float32's eps: of a log-prob z_target - lse and an entropy lse - sum p z relative to the sizes
    of their two terms, of a gradient in the norm."""

    logprob: float
    entropy: float
    gradient: float


OURS = Bound(logprob=3, entropy=3, gradient=12)
# Its entropy subtracts sums of unshifted logits, each with the rounding of its own sum over the vocabulary.
LIGER = Bound(logprob=3, entropy=12, gradient=24)


def assert_within(
    bound: Bound, result: LogProbs, expected: LogProbs, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float
) -> None:
    """Every log-prob and entropy against those in float64, each row with the allowance of its own terms."""
    z = hidden.detach().double() @ weight.detach().double().t() / scale
    logsumexp, weighted = z.logsumexp(1), (z.softmax(1) * z).sum(1)
    z_target = z.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    scored = targets != IGNORE_INDEX
    for actual, wanted, other, allowed in (
        (result.logprobs, expected.logprobs, z_target, bound.logprob),
        (result.entropy, expected.entropy, weighted, bound.entropy),
    ):
        error = (actual.double() - wanted).abs() / (EPS * (logsumexp.abs() + other.abs()))
        assert error[scored].max() <= allowed, f"{error[scored].max():.2f} eps, more than {allowed}"
        assert not actual[~scored].any()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[LogProbs, Tensor, Tensor]:
    """Log-probs and entropy by Liger, on leaves of their own, which are returned."""
    x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    nll, entropy = _FusedLinearPPOFallbackFunction.apply(x, w, targets, temperature, IGNORE_INDEX, True)
    return LogProbs(-nll, entropy), x, w


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 7), (37, 53), (700, 1009)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_liger(tokens: int, vocab: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "MAX_TILE_COLUMNS", 400)
    hidden, weight, targets = make_inputs(tokens, vocab)
    targets[::5] = IGNORE_INDEX if tokens > 1 else targets[::5]
    result = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True)
    theirs, x, w = liger(hidden, weight, targets, temperature)
    expected, exact_x, exact_w = dense_reference(hidden, weight, targets, temperature)
    backward_both(expected)
    for bound, values, leaf, head in ((OURS, result, hidden, weight), (LIGER, theirs, x, w)):
        assert_within(bound, values, expected, hidden, weight, targets, temperature)
        backward_both(values)
        assert_relative(leaf.grad, exact_x.grad, bound.gradient * EPS)
        assert_relative(head.grad, exact_w.grad, bound.gradient * EPS)


def test_liger_with_rounded_logits() -> None:
    """In bfloat16 Liger multiplies, divides and differentiates rounded logits: close, not equal. The products
    are exact, so that both round the same numbers: otherwise a CPU that sums in another order rounds some to a
    neighbour."""
    hidden, weight, targets = make_exact_inputs(300, 500, dtype=torch.bfloat16)
    result = linear_logprob(hidden, weight, targets, entropy=True, logits="bf16")
    expected, x, w = liger(hidden, weight, targets, 1.0)
    torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=1e-5, atol=1e-4)
    unrounded = linear_logprob(hidden, weight, targets).logprobs
    assert (unrounded - expected.logprobs).abs().max() > 10 * (result.logprobs - expected.logprobs).abs().max()
    backward_both(result)
    backward_both(expected)
    assert_relative(hidden.grad, x.grad.double(), 1e-2)
    assert_relative(weight.grad, w.grad.double(), 1e-2)


def test_liger_tensor_parallel() -> None:
    run_ranks(2, check_ranks)


def check_ranks(rank: int, num_ranks: int) -> None:
    group = torch.distributed.group.WORLD
    hidden, weight, targets = make_inputs(37, 54)
    targets[3] = IGNORE_INDEX
    mine = slice(27 * rank, 27 * (rank + 1))  # Liger's shards are equal
    shard = weight.detach()[mine].clone().requires_grad_()
    x, w = hidden.detach().clone().requires_grad_(), shard.detach().clone().requires_grad_()
    for temperature in (1.0, 0.7):
        hidden.grad = shard.grad = x.grad = w.grad = None
        result = linear_logprob(
            hidden, shard, targets, temperature=temperature, entropy=True, tp_group=group, vocab_start=27 * rank
        )
        nll, entropy = _TensorParallelFusedLinearPPOFallbackFunction.apply(
            x, w, targets, temperature, IGNORE_INDEX, True, group
        )
        theirs = LogProbs(-nll, entropy)
        expected, exact_x, exact_w = dense_reference(hidden, weight, targets, temperature)
        for values in (result, theirs, expected):
            backward_both(values)
        total = hidden.grad.clone()  # Liger reduces it in its backward; here the caller's region operation does
        torch.distributed.all_reduce(total, group=group)
        for bound, values, of_hidden, of_shard in (
            (OURS, result, total, shard.grad),
            (LIGER, theirs, x.grad, w.grad),
        ):
            assert_within(bound, values, expected, hidden, weight, targets, temperature)
            assert_relative(of_hidden, exact_x.grad, bound.gradient * EPS)
            assert_relative(of_shard, exact_w.grad[mine], bound.gradient * EPS)


@pytest.mark.parametrize("vocab", [53, 1009])
def test_torch_linear_cross_entropy(vocab: int) -> None:
    """At temperature 1, which is the only one it knows."""
    hidden, weight, targets = make_inputs(vocab=vocab)
    targets[4] = IGNORE_INDEX
    loss = linear_logprob(hidden, weight, targets).logprobs.sum().neg()
    x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    their_loss = functional.linear_cross_entropy(x, w, targets, reduction="sum")
    expected, exact_x, exact_w = dense_reference(hidden, weight, targets)
    expected_loss = expected.logprobs.sum().neg()
    for value in (loss, their_loss, expected_loss):
        value.backward()
    for value, leaf, head in ((loss, hidden, weight), (their_loss, x, w)):
        assert_relative(value.detach(), expected_loss.detach(), 4 * EPS)  # all terms have one sign: nothing cancels
        assert_relative(leaf.grad, exact_x.grad, OURS.gradient * EPS)
        assert_relative(head.grad, exact_w.grad, OURS.gradient * EPS)
