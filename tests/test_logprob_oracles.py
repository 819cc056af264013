"""linear_logprob against other people's: Liger's fallback functions, tensor-parallel too, and torch's own loss."""

from __future__ import annotations

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
from tests.logprob_cases import assert_relative, backward_both, make_inputs
from tests.ranks import run_ranks


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
    expected, x, w = liger(hidden, weight, targets, temperature)
    torch.testing.assert_close(result.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    backward_both(result)
    backward_both(expected)
    assert_relative(hidden.grad, x.grad.double(), 1e-5)
    assert_relative(weight.grad, w.grad.double(), 1e-5)


def test_liger_with_rounded_logits() -> None:
    """In bfloat16 Liger multiplies, divides and differentiates rounded logits: close, not equal."""
    hidden, weight, targets = make_inputs(300, 500, dtype=torch.bfloat16)
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
        torch.testing.assert_close(result.logprobs, -nll, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.entropy, entropy, rtol=1e-5, atol=1e-5)
        backward_both(result)
        backward_both(LogProbs(-nll, entropy))
        total = hidden.grad.clone()  # Liger reduces it in its backward; here the caller's region operation does
        torch.distributed.all_reduce(total, group=group)
        assert_relative(total, x.grad.double(), 1e-5)
        assert_relative(shard.grad, w.grad.double(), 1e-5)


@pytest.mark.parametrize("vocab", [53, 1009])
def test_torch_linear_cross_entropy(vocab: int) -> None:
    """At temperature 1, which is the only one it knows."""
    hidden, weight, targets = make_inputs(vocab=vocab)
    targets[4] = IGNORE_INDEX
    linear_logprob(hidden, weight, targets).logprobs.sum().neg().backward()
    x, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = functional.linear_cross_entropy(x, w, targets, reduction="sum")
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(-linear_logprob(hidden, weight, targets).logprobs.sum(), loss, rtol=1e-6, atol=0)
    assert_relative(hidden.grad, x.grad.double(), 1e-5)
    assert_relative(weight.grad, w.grad.double(), 1e-5)
