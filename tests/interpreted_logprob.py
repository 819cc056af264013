"""The Triton back ends of linear_logprob in Triton's interpreter; test_triton_logprob.py runs this file with
TRITON_INTERPRET=1, which must be set before Triton is imported, so pytest does not collect it by itself.

Factors of products are float32 here, also for bfloat16 inputs: the interpreter's bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_sr1.kernels import IGNORE_INDEX, linear_logprob
from megatron_sr1.kernels.linear_logprob import chunked, triton_forward
from megatron_sr1.kernels.linear_logprob.tiles import RowGradients, Tile, empty_state
from megatron_sr1.kernels.linear_logprob.triton_forward import Blocks
from megatron_sr1.kernels.linear_logprob.triton_tiles import TritonTiles
from tests.logprob_cases import (
    HIDDEN,
    TOKENS,
    VOCAB,
    assert_matches_dense,
    assert_relative,
    backward_both,
    check_no_scored_row,
    check_shards,
    check_top,
    dense_reference,
    make_bias,
    make_exact_inputs,
    make_inputs,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # the smallest number times log2(e)
BOTH = pytest.mark.parametrize("backend", ["triton", "fused"])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged tiles and blocks, several along every dimension, at test sizes; two tiles wait for backward."""
    shrink(monkeypatch)
    monkeypatch.setattr(chunked, "KEPT_ELEMENTS", 500)


def shrink(patch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_TILE_COLUMNS", 20), ("TILE_ELEMENTS_CPU", 200), ("MIN_TILE_ROWS", 1)):
        patch.setattr(chunked, name, value)
    blocks = Blocks(rows=16, columns=16, depth=16, split=32, group=2, warps=4, stages=1)
    patch.setattr(triton_forward, "blocks_for", lambda hidden_size, dtype: blocks)


@BOTH
@pytest.mark.usefixtures("small_blocks")
class TestAgainstDense:
    @pytest.mark.parametrize("entropy", [False, True])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_values_and_gradients(self, backend: str, temperature: float, entropy: bool) -> None:
        assert_matches_dense(*make_inputs(), temperature=temperature, entropy=entropy, backend=backend)

    def test_temperature_per_token_and_bias(self, backend: str) -> None:
        temperature = torch.linspace(0.5, 2.0, TOKENS)
        assert_matches_dense(*make_inputs(), temperature=temperature, bias=make_bias(), backend=backend)
        assert_matches_dense(*make_inputs(), bias=make_bias(), entropy=False, backend=backend)

    @pytest.mark.parametrize("vocab_size", [52, 41, 20, 3])
    def test_padded_vocabulary(self, backend: str, vocab_size: int) -> None:
        hidden, weight, targets = make_inputs()
        with torch.no_grad():
            weight[vocab_size:] = 100.0
        targets = targets % vocab_size
        assert_matches_dense(hidden, weight, targets, 0.9, vocab_size, backend=backend)
        assert weight.grad[vocab_size:].abs().max() == 0

    def test_ignored_rows_even_of_garbage(self, backend: str) -> None:
        hidden, weight, targets = make_inputs()
        targets[[0, 5, TOKENS - 1]] = IGNORE_INDEX
        assert_matches_dense(hidden, weight, targets, temperature=torch.linspace(0.5, 2.0, TOKENS), backend=backend)
        hidden.grad = weight.grad = None
        with torch.no_grad():
            hidden[5] = math.nan
        backward_both(linear_logprob(hidden, weight, targets, entropy=True, backend=backend))
        assert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and not hidden.grad[5].any()

    def test_chosen_rows_give_their_part_of_the_gradient(self, backend: str) -> None:
        hidden, weight, targets = make_inputs()
        rows = torch.tensor([1, 4, 5, 30])
        result = linear_logprob(hidden, weight, targets, entropy=True, backend=backend, grad_rows=rows)
        expected, x, w = dense_reference(hidden, weight, targets)
        (result.logprobs + 0.3 * result.entropy).sum().backward()
        (expected.logprobs + 0.3 * expected.entropy)[rows].sum().backward()
        assert_relative(hidden.grad, x.grad, 1e-5)
        assert_relative(weight.grad, w.grad, 1e-5)

    def test_the_main_gradient_is_added_to(self, backend: str) -> None:
        hidden, weight, targets = make_inputs()
        main = torch.ones_like(weight.detach())
        backward_both(linear_logprob(hidden, weight, targets, entropy=True, backend=backend, accumulate_into=main))
        expected, x, w = dense_reference(hidden, weight, targets)
        backward_both(expected)
        assert_relative(main - 1, w.grad, 1e-5)
        assert_relative(hidden.grad, x.grad, 1e-5)
        assert not weight.grad.any()

    def test_two_backwards_and_two_runs_give_the_same_bits(self, backend: str) -> None:
        runs = []
        for _ in range(2):
            hidden, weight, targets = make_inputs()
            result = linear_logprob(hidden, weight, targets, entropy=True, backend=backend)
            total = result.logprobs.sum() + result.entropy.square().sum()
            total.backward(retain_graph=True)
            once = (result.logprobs, result.entropy, hidden.grad.clone(), weight.grad.clone())
            total.backward()
            assert torch.equal(hidden.grad, 2 * once[2]) and torch.equal(weight.grad, 2 * once[3])
            runs.append(once)
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_the_same_bits_without_a_graph(self, backend: str) -> None:
        with_graph = linear_logprob(*make_inputs(), entropy=True, backend=backend)
        with torch.no_grad():
            without = linear_logprob(*make_inputs(), entropy=True, backend=backend)
        assert torch.equal(with_graph.logprobs, without.logprobs)
        assert torch.equal(with_graph.entropy, without.entropy)


@BOTH
def test_whole_tiles(backend: str) -> None:
    """The block sizes of a GPU, where the inputs fill a part of one."""
    hidden, weight, targets = make_inputs(128, 1000)
    assert_matches_dense(hidden, weight, targets, temperature=0.8, backend=backend)


@BOTH
def test_one_row_no_row_and_no_scored_row(backend: str) -> None:
    assert_matches_dense(*make_inputs(1), backend=backend)
    hidden, weight, targets = make_inputs(4)
    for x, y in ((hidden[:0], targets[:0]), (hidden, torch.full_like(targets, IGNORE_INDEX))):
        weight.grad = hidden.grad = None
        result = linear_logprob(x, weight, y, entropy=True, temperature=0.5, backend=backend)
        assert result.logprobs.shape == result.entropy.shape == y.shape
        assert not result.logprobs.any() and not result.entropy.any()
        backward_both(result)
        assert not hidden.grad.any() and not weight.grad.any()


@BOTH
def test_extreme_logits(backend: str) -> None:
    """All logits near -120 or +1250, and probabilities that round to 1: finite, right, never above 0."""
    hidden, targets = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    hidden[:, 0] = 1.0
    weight = torch.zeros(3, 4)
    weight[:, 0] = torch.tensor([-120.0, -121.0, -125.0])
    for scale in (1.0, 10.0, -1.0, -10.0):
        result = linear_logprob(hidden * scale, weight, targets, entropy=True, backend=backend)
        expected, _, _ = dense_reference(hidden * scale, weight, targets)
        torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-6, atol=1e-6)
    hidden, weight, _ = make_inputs(100, 50)
    likely = (hidden @ weight.t()).argmax(1)
    logprobs = linear_logprob(hidden * 20, weight, likely, temperature=0.77, backend=backend).logprobs
    assert logprobs.max() <= 0 and (logprobs == 0).any()


@BOTH
def test_bfloat16_inputs(backend: str) -> None:
    hidden, weight, targets = make_inputs(dtype=torch.bfloat16)
    result = linear_logprob(hidden, weight, targets, entropy=True, temperature=0.7, backend=backend)
    expected, x, w = dense_reference(hidden, weight, targets, 0.7)
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-6, atol=2e-6)
    backward_both(result)
    backward_both(expected)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert_relative(hidden.grad, x.grad, 2**-8)
    assert_relative(weight.grad, w.grad, 2**-8)


def test_rounded_logits_are_those_of_the_torch_back_end() -> None:
    runs = []
    for backend in ("torch", "triton"):
        hidden, weight, targets = make_exact_inputs()
        result = linear_logprob(hidden, weight, targets, entropy=True, temperature=0.7, logits="bf16", backend=backend)
        backward_both(result)
        runs.append((result.logprobs, result.entropy, hidden.grad, weight.grad))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_rounded_logits_of_the_fused_back_end() -> None:
    """The interpreter cuts float32 to bfloat16 where a GPU rounds, so the expected logits are cut as well."""
    hidden, weight, targets = make_exact_inputs()
    with torch.no_grad():
        scores = linear_logprob(hidden, weight, targets, temperature=0.7, logits="bf16", backend="fused").logprobs
        cut = ((hidden @ weight.t()).view(torch.int32) & -65536).view(torch.float32)
    expected = (cut.double() / 0.7).log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=2e-6)


def test_row_offsets_beyond_32_bits() -> None:
    """Three rows 2**30 elements apart, so the last lies beyond 2**31: only the pages of the rows are ever touched."""
    stride, columns = 2**30, 50
    apart = torch.empty(2 * stride + columns, dtype=torch.bfloat16).as_strided((3, columns), (stride, 1))
    near = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    apart.copy_(near)
    tile = Tile(targets=torch.tensor([1, 49, -1]), inverse_temperature=None, bias=None, rounded=True)
    states, gradients = [], []
    for z in (near, apart):
        state = empty_state(3, torch.float32, z.device)
        TritonTiles().fold(state, z, tile, entropy=True)
        states.append(state)
        ones = torch.ones(3)
        of_rows = RowGradients(ones, ones, None)
        gradient = TritonTiles().gradient(z, torch.logsumexp(near.float(), 1), tile, of_rows, torch.float32, False)
        gradients.append(gradient)
    assert torch.equal(*states) and torch.equal(*gradients)
    top, total, z_target, _ = states[0]
    torch.testing.assert_close(top + total.log(), torch.logsumexp(near.float(), 1))
    assert z_target[:2].tolist() == [near[0, 1].item(), near[1, 49].item()] and z_target[2] < -1e38


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@BOTH
def test_frozen_inputs_get_no_gradient(backend: str, needs: tuple[bool, bool]) -> None:
    hidden, weight, targets = make_inputs()
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    result = linear_logprob(hidden, weight, targets, backend=backend)
    backward_both(result)
    expected, x, w = dense_reference(hidden, weight, targets)
    backward_both(replace(expected, entropy=None))
    for tensor, reference, needed in ((hidden, x, needs[0]), (weight, w, needs[1])):
        assert (tensor.grad is not None) == needed
        if needed:
            assert_relative(tensor.grad, reference.grad, 1e-5)


def test_fused_names_a_hidden_size_that_it_cannot_read() -> None:
    hidden, weight, targets = make_inputs()
    with pytest.raises(ValueError, match="multiple of 16 bytes, but hidden has H = 23"):
        linear_logprob(hidden[:, :23], weight[:, :23], targets, backend="fused")
    assert HIDDEN == 24 and VOCAB == 53


def test_tensor_parallel() -> None:
    run_ranks(2, check_ranks)


def check_ranks(rank: int, num_ranks: int) -> None:
    shrink(pytest.MonkeyPatch())
    group = torch.distributed.group.WORLD
    for backend in ("triton", "fused"):
        check_shards(rank, group, [20, 33], 45, biased=True, backend=backend)
        check_shards(rank, group, [VOCAB - 2, 2], VOCAB - 2, backend=backend)  # a shard of padding
        check_top(rank, group, [20, 33], 45, backend)
        check_no_scored_row(group, rank, backend)
