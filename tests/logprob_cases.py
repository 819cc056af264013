"""Inputs of the fused log-prob, its definition in float64, and what every shard of a vocabulary must give."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.kernels import IGNORE_INDEX, linear_logprob
from megatron_sr1.kernels.linear_logprob.backends import BackendName
from megatron_sr1.types import LogProbs

TOKENS, HIDDEN, VOCAB = 37, 24, 53


def make_inputs(
    tokens: int = TOKENS, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, HIDDEN, generator=generator) * 0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator)


def make_exact_inputs(
    tokens: int = TOKENS, vocab: int = VOCAB, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiples of 1/8 and 1/16: float32 holds every partial sum of a logit exactly, so that rounding the logit to
    bfloat16 gives the same on every CPU, in whatever order and width it sums."""
    hidden, weight, targets = make_inputs(tokens, vocab)
    hidden, weight = ((x.detach() * steps).round() / steps for x, steps in ((hidden, 8), (weight, 16)))
    assert hidden.abs().max() < 8 and weight.abs().max() < 4, "6 bits of each before the sign, 24 products: 17 bits"
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def dense_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
) -> tuple[LogProbs, Tensor, Tensor]:
    """The definition with all logits in float64, on float64 leaves (returned, so that their gradients can be read)."""
    x = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    scale = temperature.double().unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    shift = 0.0 if bias is None else bias[:vocab_size].double()
    log_p = ((x @ w[:vocab_size].t() + shift) / scale).log_softmax(1)
    scored = targets != IGNORE_INDEX
    picked = log_p.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return LogProbs(picked * scored, -(log_p.exp() * log_p).sum(1) * scored), x, w


def backward_both(result: LogProbs, seed: int = 1) -> None:
    """Runs backward with the same random gradients of log-probs and entropy for whatever result it is given."""
    generator = torch.Generator().manual_seed(seed)
    g_logprob, g_entropy = torch.randn(2, len(result.logprobs), generator=generator, dtype=torch.float64)
    loss = (result.logprobs.double() * g_logprob).sum()
    if result.entropy is not None:
        loss = loss + (result.entropy.double() * g_entropy).sum()
    loss.backward()


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, floor: float = 1e-30) -> None:
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=floor)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def assert_matches_dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    entropy: bool = True,
    floor: float = 1e-30,
    bias: Tensor | None = None,
    backend: BackendName = "auto",
) -> None:
    result = linear_logprob(
        hidden,
        weight,
        targets,
        temperature=temperature,
        entropy=entropy,
        vocab_size=vocab_size,
        logit_bias=bias,
        backend=backend,
    )
    expected, x, w = dense_reference(hidden, weight, targets, temperature, vocab_size, bias)
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=2e-6)
    if entropy:
        torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-6, atol=2e-6)
    backward_both(result)
    backward_both(expected if entropy else replace(expected, entropy=None))
    assert_relative(hidden.grad, x.grad, 1e-5, floor)
    assert_relative(weight.grad, w.grad, 1e-5, floor)


def make_bias() -> Tensor:
    """Some ids shifted, some as good as forbidden."""
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    bias[[3, 21, 44]] = -100.0
    return bias


def check_shards(
    rank: int,
    group: ProcessGroup,
    shards: list[int],
    vocab_size: int | None,
    biased: bool = False,
    backend: BackendName = "auto",
) -> None:
    start = sum(shards[:rank])
    hidden, weight, targets = make_inputs()
    targets = targets % (vocab_size or VOCAB)
    targets[5] = IGNORE_INDEX
    with torch.no_grad():
        hidden[7] = 0.0
        weight[vocab_size or VOCAB :] = 3.0
    shard = weight.detach()[start : start + shards[rank]].clone().requires_grad_()
    result = linear_logprob(
        hidden,
        shard,
        targets,
        temperature=0.7,
        entropy=True,
        tp_group=group,
        vocab_start=start,
        vocab_size=vocab_size,
        logit_bias=make_bias()[start : start + shards[rank]] if biased else None,
        backend=backend,
    )
    expected, x, w = dense_reference(hidden, weight, targets, 0.7, vocab_size, make_bias() if biased else None)
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-6, atol=2e-6)
    for value in (result.logprobs, result.entropy):
        copies = [torch.empty_like(value) for _ in shards]
        torch.distributed.all_gather(copies, value.detach(), group=group)
        assert all(torch.equal(copy, copies[0]) for copy in copies), "ranks disagree"
    backward_both(result)
    backward_both(expected)
    padding_only = vocab_size is not None and start >= vocab_size
    assert bool(hidden.grad.any()) != padding_only
    total = hidden.grad.clone()  # the caller's region operation would reduce it
    torch.distributed.all_reduce(total, group=group)
    assert_relative(total, x.grad, 1e-5)
    assert_relative(shard.grad, w.grad[start : start + shards[rank]], 1e-5)


def check_top(
    rank: int,
    group: ProcessGroup | None,
    shards: list[int],
    vocab_size: int,
    backend: BackendName = "auto",
    bias: Tensor | None = None,
) -> None:
    """Every other target is the likeliest id, and one is not scored."""
    start = sum(shards[:rank])
    hidden, weight, targets = (x.detach() for x in make_inputs())
    weight[vocab_size:] = 100.0  # padding would win
    shift = 0.0 if bias is None else bias[:vocab_size].double()
    likeliest = (hidden.double() @ weight[:vocab_size].double().t() + shift).argmax(1)
    targets = torch.where(torch.arange(TOKENS) % 2 == 0, likeliest, targets % vocab_size)
    targets[4] = IGNORE_INDEX
    part = slice(start, start + shards[rank])
    how = {"temperature": 0.7, "tp_group": group, "vocab_start": start, "vocab_size": vocab_size, "backend": backend}
    how["logit_bias"] = None if bias is None else bias[part]
    found = linear_logprob(hidden, weight[part], targets, top=True, **how)
    assert found.is_top is not None and torch.equal(found.is_top, targets == likeliest)
    assert 15 < int(found.is_top.sum()) < TOKENS - 10, "both kinds occur"
    assert linear_logprob(hidden, weight[part], targets, **how).is_top is None


def check_no_scored_row(group: ProcessGroup, rank: int, backend: BackendName = "auto") -> None:
    hidden, weight, targets = make_inputs(4, 10)
    ignored = torch.full_like(targets, IGNORE_INDEX)
    result = linear_logprob(
        hidden, weight, ignored, tp_group=group, vocab_start=10 * rank, entropy=True, backend=backend
    )
    backward_both(result)
    assert not result.logprobs.any() and not hidden.grad.any() and not weight.grad.any()
