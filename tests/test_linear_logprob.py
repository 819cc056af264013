"""The fused log-prob against the dense formula in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sr1.kernels import IGNORE_INDEX, linear_logprob
from megatron_sr1.kernels.linear_logprob import backends, chunked
from megatron_sr1.kernels.linear_logprob.backends import BackendName
from megatron_sr1.kernels.linear_logprob.torch_tiles import TORCH
from megatron_sr1.platform.cpu_shim import install_cpu_shim
from megatron_sr1.types import LogProbs
from tests.logprob_cases import (
    HIDDEN,
    TOKENS,
    VOCAB,
    assert_matches_dense,
    assert_relative,
    backward_both,
    dense_reference,
    make_bias,
    make_exact_inputs,
    make_inputs,
)
from tests.ranks import run_ranks


@pytest.fixture(params=[0, 500], ids=["none_kept", "some_kept"])
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Several ragged tiles along tokens and along the vocabulary, at test sizes."""
    monkeypatch.setattr(chunked, "KEPT_ELEMENTS", request.param)
    monkeypatch.setattr(chunked, "MAX_TILE_COLUMNS", 20)
    monkeypatch.setattr(chunked, "TILE_ELEMENTS_CPU", 200)
    monkeypatch.setattr(chunked, "MIN_TILE_ROWS", 1)


@pytest.mark.usefixtures("small_tiles")
class TestAgainstDense:
    @pytest.mark.parametrize("entropy", [False, True])
    @pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
    def test_values_and_gradients(self, temperature: float, entropy: bool) -> None:
        assert_matches_dense(*make_inputs(), temperature=temperature, entropy=entropy)

    def test_temperature_per_token(self) -> None:
        temperature = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2)) + 0.5
        assert_matches_dense(*make_inputs(), temperature=temperature)
        hidden, weight, targets = make_inputs()
        one = linear_logprob(hidden, weight, targets, temperature=torch.full((TOKENS,), 0.7)).logprobs
        assert torch.equal(one, linear_logprob(hidden, weight, targets, temperature=0.7).logprobs)

    @pytest.mark.parametrize("vocab_size", [52, 41, 40, 20, 1])  # inside a tile, at its edge, all of the others
    def test_padded_vocabulary(self, vocab_size: int) -> None:
        hidden, weight, targets = make_inputs()
        with torch.no_grad():
            weight[vocab_size:] = 100.0  # would win every softmax if it were looked at
        assert_matches_dense(hidden, weight, targets % vocab_size, temperature=0.9, vocab_size=vocab_size)
        assert weight.grad[vocab_size:].abs().max() == 0

    def test_ignored_rows(self) -> None:
        hidden, weight, targets = make_inputs()
        targets[[0, 5, 6, TOKENS - 1]] = IGNORE_INDEX
        temperature = torch.linspace(0.5, 2.0, TOKENS)
        assert_matches_dense(hidden, weight, targets, temperature=temperature)
        assert hidden.grad[[0, 5, 6, TOKENS - 1]].abs().max() == 0

    def test_garbage_in_an_ignored_row_reaches_nothing(self) -> None:
        hidden, weight, targets = make_inputs()
        targets[3] = IGNORE_INDEX
        with torch.no_grad():
            hidden[3] = math.nan
        backward_both(linear_logprob(hidden, weight, targets, entropy=True))
        assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        tokens=st.integers(1, 30),
        vocab=st.integers(2, 70),
        temperature=st.floats(0.5, 3.0),
        seed=st.integers(0, 99),
    )
    def test_any_shape(self, tokens: int, vocab: int, temperature: float, seed: int) -> None:
        # Where p is nearly 1, 1 - p cancels in float32: a gradient of a few rows can be small, its error not smaller.
        assert_matches_dense(*make_inputs(tokens, vocab, seed=seed), temperature=temperature, floor=1.0)

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_gradcheck(self, temperature: float) -> None:
        hidden, weight, targets = make_inputs(6, 23, torch.float64)
        targets[2] = IGNORE_INDEX

        def both(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            result = linear_logprob(x, w, targets, temperature=temperature, entropy=True, vocab_size=23)
            return result.logprobs, result.entropy

        assert torch.autograd.gradcheck(both, (hidden, weight))

    def test_bfloat16_loses_only_the_rounding_of_its_inputs(self) -> None:
        hidden, weight, targets = make_inputs(dtype=torch.bfloat16)
        result = linear_logprob(hidden, weight, targets, entropy=True, temperature=0.7)
        expected, x, w = dense_reference(hidden, weight, targets, 0.7)
        assert result.logprobs.dtype == torch.float32 and hidden.dtype == torch.bfloat16
        torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=2e-6)
        backward_both(result)
        backward_both(expected)
        assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
        assert_relative(hidden.grad, x.grad, 2**-8)  # one rounding to bfloat16, however many tiles were summed
        assert_relative(weight.grad, w.grad, 2**-8)

    def test_deterministic(self) -> None:
        runs = []
        for _ in range(2):
            hidden, weight, targets = make_inputs()
            result = linear_logprob(hidden, weight, targets, entropy=True)
            backward_both(result)
            runs.append((result.logprobs, result.entropy, hidden.grad, weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_only_entropy_has_a_gradient(self) -> None:
        hidden, weight, targets = make_inputs()
        linear_logprob(hidden, weight, targets, entropy=True).entropy.sum().backward()
        expected, x, w = dense_reference(hidden, weight, targets)
        expected.entropy.sum().backward()
        assert_relative(hidden.grad, x.grad, 1e-5)
        assert_relative(weight.grad, w.grad, 1e-5)


def test_kept_logits_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "TILE_ELEMENTS_CPU", 200)
    monkeypatch.setattr(chunked, "MIN_TILE_ROWS", 1)
    runs = []
    for kept in (0, 700, 2**22):
        monkeypatch.setattr(chunked, "KEPT_ELEMENTS", kept)
        hidden, weight, targets = make_inputs()
        loss = linear_logprob(hidden, weight, targets, entropy=True, temperature=0.7)
        total = loss.logprobs.sum() + loss.entropy.square().sum()
        total.backward(retain_graph=True)
        runs.append((hidden.grad.clone(), weight.grad.clone()))
        total.backward()  # the first backward must have left the kept tiles as they were
        assert torch.equal(hidden.grad, 2 * runs[-1][0]) and torch.equal(weight.grad, 2 * runs[-1][1])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_huge_negative_and_huge_positive_logits() -> None:
    hidden, weight, targets = torch.ones(3, 1), torch.tensor([[-120.0], [-121.0], [-125.0]]), torch.tensor([0, 1, 2])
    for scale in (1.0, 10.0, -1.0, -10.0):
        result = linear_logprob(hidden * scale, weight, targets)
        expected, _, _ = dense_reference(hidden * scale, weight, targets)
        torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=1e-6)
    certain = linear_logprob(torch.ones(1, 1), torch.tensor([[3e4], [-3e4]]), torch.tensor([0]), entropy=True)
    assert certain.logprobs.item() == 0 and certain.entropy.item() == 0


def test_log_prob_is_never_positive() -> None:
    hidden, weight, _ = make_inputs(500, 50)
    likely = (hidden @ weight.t()).argmax(1)
    assert linear_logprob(hidden * 20, weight, likely).logprobs.max() <= 0


def test_one_row_no_row_and_no_scored_row() -> None:
    assert_matches_dense(*make_inputs(1))
    hidden, weight, targets = make_inputs(4)
    for x, y in ((hidden[:0], targets[:0]), (hidden, torch.full_like(targets, IGNORE_INDEX))):
        weight.grad = hidden.grad = None
        result = linear_logprob(x, weight, y, entropy=True, temperature=0.5)
        assert result.logprobs.shape == result.entropy.shape == y.shape
        assert not result.logprobs.any() and not result.entropy.any()
        backward_both(result)
        assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_frozen_inputs_cost_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make_inputs()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    monkeypatch.setattr(chunked, "KEPT_ELEMENTS", 0)
    result = linear_logprob(hidden, weight, targets)
    assert result.logprobs.requires_grad == (frozen != "both")
    with ProductCounter() as counter:
        if frozen != "both":
            result.logprobs.sum().backward()
    assert counter.products == (0 if frozen == "both" else 2)  # the logits again, and the one gradient
    assert (hidden.grad is None) == (frozen != "weight") and (weight.grad is None) == (frozen != "hidden")


def test_no_grad_builds_no_graph() -> None:
    with torch.no_grad():
        result = linear_logprob(*make_inputs(), entropy=True)
    assert result.logprobs.grad_fn is None and result.entropy.grad_fn is None
    with_graph = linear_logprob(*make_inputs(), entropy=True)
    assert torch.equal(result.logprobs, with_graph.logprobs) and torch.equal(result.entropy, with_graph.entropy)


class ProductCounter(TorchDispatchMode):
    """Counts matrix products and remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket.__name__ in ("mm", "addmm_")
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(("tokens", "vocab"), [(16_384, 640), (1024, 20_000)])
def test_logits_are_never_held(tokens: int, vocab: int) -> None:
    hidden, weight, targets = make_inputs(tokens, vocab)
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with ProductCounter() as counter:
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            result = linear_logprob(hidden, weight, targets, entropy=True, temperature=0.8)
        backward_both(result)
    tile = max(chunked.TILE_ELEMENTS_CPU, chunked.MIN_TILE_ROWS * chunked.MAX_TILE_COLUMNS)
    assert counter.products > 0
    assert counter.largest <= max(hidden.numel(), weight.numel(), tile) < tokens * vocab / 4
    inputs = (hidden.data_ptr(), weight.data_ptr())
    kept = sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in inputs)
    assert tile < kept <= chunked.KEPT_ELEMENTS + 4 * tokens < tokens * vocab / 2


class TestChosenRows:
    """Rows that take part in backward: named before, or found by their gradients."""

    ROWS = torch.tensor([0, 3, 4, 17, TOKENS - 1])

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of log-probs and entropies: zero but for ROWS, two of which have only one of them."""
        generator = torch.Generator().manual_seed(5)
        of_logprobs, of_entropy = torch.zeros(2, TOKENS)
        of_logprobs[self.ROWS[1:]] = torch.randn(4, generator=generator)
        of_entropy[self.ROWS[:-1]] = torch.randn(4, generator=generator)
        return of_logprobs, of_entropy

    @pytest.mark.usefixtures("small_tiles")
    @pytest.mark.parametrize("ignored", [True, False])
    def test_gradients_are_those_of_all_rows(self, ignored: bool) -> None:
        hidden, weight, targets = make_inputs()
        if ignored:
            targets[[2, 3, 30]] = IGNORE_INDEX
        of_logprobs, of_entropy = self.weights()
        temperature = torch.linspace(0.5, 2.0, TOKENS)
        result = linear_logprob(hidden, weight, targets, temperature=temperature, entropy=True, grad_rows=self.ROWS)
        expected, x, w = dense_reference(hidden, weight, targets, temperature)
        torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=2e-6)
        for scores in (result, expected):
            (scores.logprobs * of_logprobs + scores.entropy * of_entropy).sum().backward()
        assert_relative(hidden.grad, x.grad, 1e-5)
        assert_relative(weight.grad, w.grad, 1e-5)

    def test_the_other_rows_cost_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(chunked, "KEPT_ELEMENTS", 0)
        seen: list[int] = []

        class Spy(type(TORCH.tiles)):
            def make(self, hidden: Tensor, *others: Tensor) -> Tensor:
                seen.append(len(hidden))
                return super().make(hidden, *others)

        monkeypatch.setattr(backends, "TORCH", replace(TORCH, tiles=Spy()))
        hidden, weight, targets = make_inputs()
        result = linear_logprob(hidden, weight, targets, grad_rows=self.ROWS)
        (result.logprobs * torch.zeros(TOKENS).index_fill(0, self.ROWS, 1.0)).sum().backward()
        assert seen == [TOKENS, len(self.ROWS)]

    def test_no_logits_wait_for_rows_named_before(self) -> None:
        """A backward over chosen rows has other tiles than forward."""
        for grad_rows, most in ((self.ROWS, 8 * TOKENS), (None, TOKENS * VOCAB + 8 * TOKENS)):
            hidden, weight, targets = make_inputs()
            saved: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()), lambda x: x):
                linear_logprob(hidden, weight, targets, grad_rows=grad_rows)
            assert most / 8 <= sum(saved) - hidden.numel() - weight.numel() <= most

    def test_no_row_and_every_row(self) -> None:
        hidden, weight, targets = make_inputs()
        linear_logprob(hidden, weight, targets, grad_rows=torch.zeros(0, dtype=torch.int64)).logprobs.sum().backward()
        assert not hidden.grad.any() and not weight.grad.any()
        runs = []
        for grad_rows in (None, torch.arange(TOKENS)):
            hidden, weight, targets = make_inputs()
            backward_both(linear_logprob(hidden, weight, targets, entropy=True, grad_rows=grad_rows))
            runs.append((hidden.grad, weight.grad))
        for ours, theirs in zip(*runs, strict=True):
            assert_relative(ours, theirs.double(), 1e-6)

    @pytest.mark.parametrize("rows", [[3, 3], [4, 1], [-1], [TOKENS]])
    def test_rows_that_are_not_rows(self, rows: list[int]) -> None:
        with pytest.raises(ValueError, match=rf"ascending row numbers, each once, in \[0, {TOKENS}\)"):
            linear_logprob(*make_inputs(), grad_rows=torch.tensor(rows))
        with pytest.raises(ValueError, match=r"torch.bool \(37,\); it must be int64"):
            linear_logprob(*make_inputs(), grad_rows=torch.ones(TOKENS, dtype=torch.bool))


class TestMainGradient:
    @pytest.mark.usefixtures("small_tiles")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_two_micro_batches_add_up_unrounded(self, dtype: torch.dtype) -> None:
        hidden, weight, targets = make_inputs(dtype=dtype)
        main = torch.zeros(weight.shape, dtype=torch.promote_types(dtype, torch.float32))
        total = torch.zeros(weight.shape, dtype=torch.float64)
        for seed in (1, 2):
            result = linear_logprob(hidden, weight, targets, entropy=True, vocab_size=VOCAB, accumulate_into=main)
            expected, _, w = dense_reference(hidden, weight, targets)
            backward_both(result, seed)
            backward_both(expected, seed)
            total += w.grad
        # Only the CPU's float32 factors of products come between a bfloat16 head and its float32 gradient.
        assert_relative(main, total, 1e-5)
        assert not weight.grad.any() and weight.grad_added_to_main_grad

    def test_padding_and_frozen_heads_are_left_alone(self) -> None:
        hidden, weight, targets = make_inputs()
        main = torch.full_like(weight.detach(), 7.0)
        result = linear_logprob(hidden, weight, targets % 40, vocab_size=40, accumulate_into=main)
        backward_both(result)
        assert (main[40:] == 7).all() and (main[:40] != 7).any()
        frozen = torch.full_like(main, 7.0)
        backward_both(linear_logprob(hidden, weight.detach(), targets, accumulate_into=frozen))
        assert (frozen == 7).all()

    def test_a_buffer_that_does_not_fit(self) -> None:
        hidden, weight, targets = make_inputs(dtype=torch.bfloat16)
        for wrong in (torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16), torch.zeros(VOCAB, 2)):
            with pytest.raises(ValueError, match=r"needs torch.float32 \(53, 24\) on cpu"):
                linear_logprob(hidden, weight, targets, accumulate_into=wrong)

    @pytest.mark.parametrize("tied", [False, True])
    def test_under_the_ddp_of_megatron(self, tied: bool) -> None:
        run_ranks(1, check_ddp, tied)


class Head(torch.nn.Module):
    """A model of one matrix: the head and, tied, the embedding as well."""

    def __init__(self, config: Any, weight: Tensor, tied: bool) -> None:
        super().__init__()
        self.config = config
        self.weight = torch.nn.Parameter(weight.clone())
        self.weight.zero_out_wgrad = tied
        self.tied = tied

    def forward(self, hidden: Tensor, targets: Tensor, straight: bool) -> Tensor:
        if self.tied:
            hidden = hidden + functional.embedding(targets, self.weight)
        into = self.weight.main_grad if straight else None
        return linear_logprob(hidden, self.weight, targets, accumulate_into=into).logprobs


def check_ddp(rank: int, num_ranks: int, tied: bool) -> None:
    """Megatron's own hook on the parameter, of two micro-batches: the same main gradient on both ways to it."""
    install_cpu_shim()
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    gradients = []
    for straight in (False, True):
        hidden, weight, targets = make_inputs()
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        model = DistributedDataParallel(config, settings, Head(config, weight.detach(), tied))
        model.zero_grad_buffer()
        for part in (slice(0, 20), slice(20, None)):
            model(hidden[part], targets[part], straight).sum().backward()
        gradients.append(model.module.weight.main_grad)
    x, w = hidden.detach().double(), weight.detach().double().requires_grad_()
    x = x + functional.embedding(targets, w) if tied else x
    (x @ w.t()).log_softmax(1).gather(1, targets.unsqueeze(1)).sum().backward()
    for gradient in gradients:
        assert_relative(gradient, w.grad, 1e-5)


class TestRoundedLogits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_use_sees_the_same_rounded_logits(self, small_tiles: None, dtype: torch.dtype) -> None:
        """Autograd through rounded dense logits, whose rounding passes the gradient on, is the reference."""
        hidden, weight, targets = make_exact_inputs(dtype=dtype)
        result = linear_logprob(
            hidden, weight, targets, entropy=True, temperature=0.7, logit_bias=make_bias(), logits="bf16"
        )
        x, w = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
        log_p = (((x @ w.t()).bfloat16().double() + make_bias()) / 0.7).log_softmax(1)
        expected = LogProbs(log_p.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(1))
        torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-6, atol=2e-6)
        backward_both(result)
        backward_both(expected)
        assert_relative(hidden.grad, x.grad.double(), 2**-8)  # that reference rounds the gradient of its logits too
        assert_relative(weight.grad, w.grad.double(), 2**-8)

    def test_rounding_costs_what_is_said(self) -> None:
        plain, rounded = (linear_logprob(*make_inputs(), logits=logits).logprobs for logits in ("fp32", "bf16"))
        assert 1e-3 < (plain - rounded).abs().max() < 0.06
        with pytest.raises(ValueError, match="logits='fp16' is not allowed"):
            linear_logprob(*make_inputs(), logits="fp16")


class TestBackends:
    def test_without_a_gpu_it_is_torch(self) -> None:
        assert backends.select_backend("auto", torch.zeros(1, 8)) is TORCH
        assert backends.fastest(torch.bfloat16, 3584, has_graph=False) == "fused"
        assert backends.fastest(torch.float64, 64, has_graph=False) == "torch"
        for hidden, has_graph in ((3584, True), (5120, False), (3585, False)):
            assert backends.fastest(torch.bfloat16, hidden, has_graph=has_graph) == "triton"

    @pytest.mark.parametrize("name", ["triton", "fused"])
    def test_what_cannot_run_is_refused(self, name: BackendName, monkeypatch: pytest.MonkeyPatch) -> None:
        hidden, weight, targets = make_inputs()
        with pytest.raises(ValueError, match="for float64 use torch"):
            linear_logprob(hidden.double(), weight.double(), targets, backend=name)
        monkeypatch.setattr(backends, "find_spec", lambda package: None)
        with pytest.raises(ValueError, match="needs the package triton"):
            linear_logprob(hidden, weight, targets, backend=name)

    def test_an_unknown_name(self) -> None:
        with pytest.raises(ValueError, match="backend='cuda' is unknown: use auto, torch, triton or fused"):
            linear_logprob(*make_inputs(), backend="cuda")


class TestErrors:
    @pytest.mark.parametrize("bad", [VOCAB, -1, -101, 10**9])
    def test_target_out_of_range_names_the_row(self, bad: int) -> None:
        hidden, weight, targets = make_inputs()
        targets[2], targets[7], targets[9] = IGNORE_INDEX, bad, bad
        with pytest.raises(ValueError, match=rf"targets\[7\] is {bad}, not in the vocabulary \[0, {VOCAB}\).* 2 of 37"):
            linear_logprob(hidden, weight, targets)

    def test_target_in_the_padding(self) -> None:
        hidden, weight, targets = make_inputs()
        targets[0] = 50
        with pytest.raises(ValueError, match=r"targets\[\d+\] is 5\d, not in the vocabulary \[0, 50\)"):
            linear_logprob(hidden, weight, targets, vocab_size=50)

    @pytest.mark.parametrize(
        "temperature", [0.0, -1.0, math.nan, torch.zeros(TOKENS), torch.ones(3), torch.tensor(math.nan)]
    )
    def test_temperature(self, temperature: float | Tensor) -> None:
        with pytest.raises(ValueError, match="temperature"):
            linear_logprob(*make_inputs(), temperature=temperature)

    def test_shapes_dtypes_and_shards(self) -> None:
        hidden, weight, targets = make_inputs()
        with pytest.raises(ValueError, match=r"hidden \(37, 24\) and weight \(53, 20\)"):
            linear_logprob(hidden, weight[:, :20], targets)
        with pytest.raises(ValueError, match="Flatten"):
            linear_logprob(hidden.unsqueeze(0), weight, targets)
        with pytest.raises(ValueError, match="one int64 id per row"):
            linear_logprob(hidden, weight, targets[:5])
        with pytest.raises(ValueError, match=r"torch.int32 \(37,\)"):
            linear_logprob(hidden, weight, targets.int())
        with pytest.raises(ValueError, match="bfloat16"):
            linear_logprob(hidden, weight.bfloat16(), targets)
        with pytest.raises(ValueError, match="vocab_start=4 needs a tp_group"):
            linear_logprob(hidden, weight, targets, vocab_start=4)
        with pytest.raises(ValueError, match="pass tp_group"):
            linear_logprob(hidden, weight, targets, vocab_size=VOCAB + 1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logit_bias_is_added_before_the_temperature(small_tiles: None, temperature: float) -> None:
    hidden, weight, targets = make_inputs()
    targets[2] = 21  # a forbidden id keeps a finite score
    result = linear_logprob(
        hidden, weight, targets, temperature=temperature, entropy=True, logit_bias=make_bias().requires_grad_()
    )
    expected, x, w = dense_reference(hidden, weight, targets, temperature, bias=make_bias())
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-6, atol=2e-6)
    assert result.logprobs[2] < -90
    backward_both(result)
    backward_both(expected)
    assert_relative(hidden.grad, x.grad, 1e-5)
    assert_relative(weight.grad, w.grad, 1e-5)


def test_a_bias_of_another_size_is_refused() -> None:
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match=r"logit_bias \(7,\) must be one number per row of weight, \[53\]"):
        linear_logprob(hidden, weight, targets, logit_bias=torch.zeros(7))
