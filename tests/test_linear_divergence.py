"""The fused KL between two contexts against torch's kl_div on all logits, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sr1.kernels import linear_divergence
from megatron_sr1.kernels.linear_logprob import chunked
from tests.logprob_cases import HIDDEN, TOKENS, VOCAB, assert_relative, make_bias, make_inputs
from tests.ranks import run_ranks


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged tiles along rows and along the vocabulary, at test sizes."""
    monkeypatch.setattr(chunked, "MAX_TILE_COLUMNS", 20)
    monkeypatch.setattr(chunked, "TILE_ELEMENTS_CPU", 200)
    monkeypatch.setattr(chunked, "MIN_TILE_ROWS", 1)


def made(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Both contexts' hidden states and the head; some rows far apart, some near, one the same."""
    own, weight, _ = make_inputs(dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    apart = torch.randn(TOKENS, HIDDEN, generator=generator) * torch.logspace(-3, 0.5, TOKENS)[:, None]
    apart[3] = 0.0
    return own, (own.detach().float() + apart).to(dtype).requires_grad_(), weight


def plain(
    own: Tensor, other: Tensor, weight: Tensor, temperature: Any = 1.0, size: int | None = None, bias: Any = None
) -> tuple[Tensor, list[Tensor]]:
    """torch's KL in float64, with the leaves whose gradients it has."""
    leaves = [each.detach().double().requires_grad_() for each in (own, other, weight)]
    shift = 0.0 if bias is None else bias[:size].double()
    scale = temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature
    p, q = (((leaf @ leaves[2][:size].t() + shift) / scale).log_softmax(1) for leaf in leaves[:2])
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(1), leaves


def slopes(number: int = TOKENS) -> Tensor:
    return torch.randn(number, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def check(own: Tensor, other: Tensor, weight: Tensor, tolerance: float = 1e-5, **options: Any) -> None:
    found = linear_divergence(own, other, weight, **options)
    reference = {"temperature": options.get("temperature", 1.0), "size": options.get("vocab_size")}
    expected, leaves = plain(own, other, weight, bias=options.get("logit_bias"), **reference)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4e-6)
    (found.double() * slopes()).sum().backward()
    (expected * slopes()).sum().backward()
    for mine, theirs in zip((own, other, weight), leaves, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert_relative(mine.grad, theirs.grad, tolerance)


@pytest.mark.usefixtures("small_tiles")
class TestAgainstTorch:
    @pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
    def test_values_and_gradients(self, temperature: float) -> None:
        check(*made(), temperature=temperature)

    def test_in_float64(self) -> None:
        check(*made(torch.float64), tolerance=1e-10, temperature=0.7, logit_bias=make_bias())

    def test_a_temperature_of_each_row(self) -> None:
        check(*made(), temperature=torch.linspace(0.5, 2.0, TOKENS))

    def test_banned_ids(self) -> None:
        check(*made(), logit_bias=make_bias(), temperature=0.9)

    @pytest.mark.parametrize("size", [52, 41, 40, 20, 2])
    def test_a_padded_vocabulary(self, size: int) -> None:
        own, other, weight = made()
        with torch.no_grad():
            weight[size:] = 100.0  # would win every softmax if it were looked at
        check(own, other, weight, vocab_size=size)
        assert weight.grad is not None and not weight.grad[size:].any()


@pytest.mark.usefixtures("small_tiles")
def test_each_context_has_its_part_of_the_gradient() -> None:
    """Trained apart, each with the other as a constant, they add up to both at once."""
    gradients = {}
    for through in ("own", "other", "both"):
        leaves = made(torch.float64)
        value = linear_divergence(*leaves, through=through, temperature=0.8)
        (value * slopes()).sum().backward()
        gradients[through] = [leaf.grad for leaf in leaves]
    own, other, both = gradients["own"], gradients["other"], gradients["both"]
    assert own[1] is None and other[0] is None
    torch.testing.assert_close([own[0], other[1], own[2] + other[2]], both, rtol=1e-10, atol=1e-12)
    assert own[2].any() and other[2].any()


def test_a_context_is_at_distance_0_of_itself() -> None:
    """To the bit, and pulled nowhere."""
    for dtype in (torch.float32, torch.bfloat16):
        own, _, weight = made(dtype)
        other = own.detach().clone().requires_grad_()
        found = linear_divergence(own, other, weight, temperature=0.7, logit_bias=make_bias())
        assert torch.equal(found, torch.zeros(TOKENS))
        found.sum().backward()
        assert max(float(leaf.grad.abs().max()) for leaf in (own, other, weight)) < 1e-6
    assert float(linear_divergence(*made())[3]) == 0.0, "one row of many, too"


def test_by_hand() -> None:
    """p = 3/4 1/4 and q = 1/4 3/4: KL = ln 3 / 2; by the first logit -3/16 log(1/9) ... = p (log p/q - KL)."""
    weight = torch.eye(2, dtype=torch.float64)
    log3 = torch.tensor(3.0, dtype=torch.float64).log()
    own = torch.stack([log3, log3 * 0])[None].requires_grad_()
    other = torch.stack([log3 * 0, log3])[None].requires_grad_()
    value = linear_divergence(own, other, weight)
    assert value.tolist() == pytest.approx([float(log3) / 2])
    value.sum().backward()
    assert own.grad is not None and other.grad is not None
    assert own.grad[0].tolist() == pytest.approx([0.375 * float(log3), -0.375 * float(log3)])
    assert other.grad[0].tolist() == pytest.approx([-0.5, 0.5])


def test_the_main_gradient_is_added_to() -> None:
    expected, main = made(), torch.ones(VOCAB, HIDDEN)
    linear_divergence(*expected).sum().backward()
    own, other, weight = made()
    linear_divergence(own, other, weight, accumulate_into=main).sum().backward()
    torch.testing.assert_close(main - 1.0, expected[2].grad, rtol=1e-5, atol=1e-5)
    assert not weight.grad.any() and weight.grad_added_to_main_grad


def test_no_row() -> None:
    own, other, weight = (each.detach().requires_grad_() for each in made())
    empty = linear_divergence(own[:0], other[:0], weight)
    empty.sum().backward()
    assert empty.shape == (0,) and not weight.grad.any()


def test_odd_values_are_refused() -> None:
    own, other, weight = made()
    for bad, message in (
        ({"through": "all"}, "through='all'.*use own, other or both"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"logits": "fp16"}, "logits='fp16'"),
        ({"vocab_size": VOCAB + 1}, "vocab_size=54"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_divergence(own, other, weight, **bad)
    with pytest.raises(ValueError, match="one int64 id per row"):
        linear_divergence(own, other[:5], weight)
    with pytest.raises(ValueError, match=r"must be \[T, H\]"):
        linear_divergence(own, other[:, :5], weight)
    with pytest.raises(ValueError, match="same"):
        linear_divergence(own, other.double(), weight)


class _Largest(TorchDispatchMode):
    """The most elements of anything that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(each.numel() for each in (out,) if isinstance(each, Tensor))])
        return out


def test_no_tensor_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is larger than a tile, the hidden states or the head, forward and backward."""
    monkeypatch.setattr(chunked, "MAX_TILE_COLUMNS", 64)
    monkeypatch.setattr(chunked, "TILE_ELEMENTS_CPU", 64 * 32)
    monkeypatch.setattr(chunked, "MIN_TILE_ROWS", 1)
    own, other = (torch.randn(500, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(700, 8, requires_grad=True)
    with _Largest() as seen:
        linear_divergence(own, other, weight).sum().backward()
    assert seen.most == 700 * 8 < 500 * 700 / 50


def check_ranks(rank: int, num_ranks: int) -> None:
    """Uneven shards, padding in the last one or filling one, banned ids; all ranks have the same bits."""
    whole = torch.distributed.group.WORLD
    pair = torch.distributed.new_group([0, 1])
    for group, size in ((whole, num_ranks), (pair, 2)):
        if rank < size:
            uneven = [20, 33] if size == 2 else [20, 5, 28]
            check_shards(rank, group, uneven, None)
            check_shards(rank, group, uneven, VOCAB)
            check_shards(rank, group, uneven, 45)
            check_shards(rank, group, [VOCAB - 2, 2] if size == 2 else [VOCAB - 2, 1, 1], VOCAB - 2)


def check_shards(rank: int, group: ProcessGroup, shards: list[int], size: int | None) -> None:
    start = sum(shards[:rank])
    own, other, weight = made()
    shard = weight.detach()[start : start + shards[rank]].clone().requires_grad_()
    bias = make_bias()
    found = linear_divergence(
        own,
        other,
        shard,
        temperature=0.7,
        tp_group=group,
        vocab_start=start,
        vocab_size=size,
        logit_bias=bias[start : start + shards[rank]],
    )
    expected, (x, y, w) = plain(own, other, weight, 0.7, size, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=4e-6)
    assert float(found[3]) == 0.0
    copies = [torch.empty_like(found) for _ in shards]
    torch.distributed.all_gather(copies, found.detach(), group=group)
    assert all(torch.equal(copy, copies[0]) for copy in copies), "ranks disagree"
    (found.double() * slopes()).sum().backward()
    (expected * slopes()).sum().backward()
    for mine, theirs in ((own, x), (other, y)):
        total = mine.grad.clone()  # the caller's region operation would reduce it
        torch.distributed.all_reduce(total, group=group)
        assert_relative(total, theirs.grad, 1e-5)
    assert_relative(shard.grad, w.grad[start : start + shards[rank]], 1e-5)


def test_tensor_parallel_over_two_and_three_ranks() -> None:
    run_ranks(3, check_ranks)
