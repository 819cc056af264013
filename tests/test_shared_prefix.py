"""Rows in which a prompt is there once for its responses are to the policy what rows of whole sequences are.

The oracle of attention is a dense softmax under a mask, in fp64; that of the policy the same sequences, unshared.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from megatron_sr1.packing import attention, attention_calls, gather_rows, pack
from megatron_sr1.packing.context import context_index
from megatron_sr1.platform.torch_private import deterministic_kernels
from megatron_sr1.policy.layers.joined_attention import joined_attention
from megatron_sr1.processor import Processor
from megatron_sr1.types import MicroBatch, Scoring, TokenSequence
from tests.model_zoo import create_family
from tests.policy_cases import TOLERANCE, MeanLoss, built, relative_error
from tests.ranks import run_ranks

HEADS, KEY_HEADS, CHANNELS = 4, 2, 8
FAMILIES = ("qwen2_5_vl_tied", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


# ---------------------------------------------------------------- attention
def dense(query: Tensor, key: Tensor, value: Tensor, edges: list[int], parents: list[int]) -> Tensor:
    """[T, h, d], of whole rows."""
    place = torch.arange(len(query))
    segment = torch.tensor([number for number, parent in enumerate(parents) for _ in range(*edges[number:][:2])])
    parent = torch.tensor(parents)[segment]
    seen = (segment[:, None] == segment) & (place <= place[:, None]) | (parent[:, None] == segment)
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


@st.composite
def rows_of_segments(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths, in units, and parents."""
    lengths, parents = [], []
    for _ in range(draw(st.integers(1, 4))):
        parents += [-1, *[len(lengths)] * draw(st.sampled_from([0, 0, 1, 2, 5]))]
        lengths += draw(st.lists(st.integers(1, 9), min_size=len(parents) - len(lengths), max_size=len(parents)))
        lengths = lengths[: len(parents)]
    return lengths, parents


@settings(max_examples=60, deadline=None)
@given(row=rows_of_segments(), size=st.sampled_from([1, 2, 3]), padded=st.booleans(), seed=st.integers(0, 99))
def test_joined_calls_are_one_softmax(row: tuple[list[int], list[int]], size: int, padded: bool, seed: int) -> None:
    """Forward and all gradients, of whole rows and of context-parallel ranks, which together hold each query once."""
    lengths, parents = row
    unit = 1 if size == 1 else 2 * size
    edges = [0, *accumulate(unit * length for length in lengths)]
    torch.manual_seed(seed)
    shapes = [(edges[-1], heads, CHANNELS) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    exact = [torch.randn(shape, dtype=torch.float64).mul(2).requires_grad_() for shape in shapes]
    expected = dense(*exact[:3], edges, parents)
    wanted = torch.autograd.grad(expected, exact[:3], exact[3])
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    found = torch.zeros(shapes[0])
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_PADDING", 1e9 if padded else 1.0)
        for rank in range(size):
            local = context_index(cu_seqlens, rank, size)
            calls = attention_calls(cu_seqlens, parents, rank, size)
            assert len(calls) == 1 + (max(parents) >= 0)
            found = found.index_copy(0, local, joined_attention(ours[0][local], *ours[1:3], calls))
        gradients = torch.autograd.grad(found, ours[:3], ours[3])
    assert relative_error(found, expected) < TOLERANCE
    for gradient, right in zip(gradients, wanted, strict=True):
        assert (gradient - right).norm() < TOLERANCE * (right.norm() + 1.0)  # of one token alone they are 0


def test_a_large_score_overflows_nothing() -> None:
    """Probabilities of 0 and 1, and a prefix that holds nearly all the weight."""
    edges, parents = [0, 4, 7, 9], [-1, 0, 0]
    torch.manual_seed(0)
    query, key, value = (torch.randn(9, heads, CHANNELS) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    key[:4] *= 300.0
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = joined_attention(*tensors, attention_calls(torch.tensor(edges, dtype=torch.int32), parents))
    expected = dense(*(tensor.double() for tensor in tensors), edges, parents)
    assert relative_error(out, expected) < TOLERANCE
    for found, right in zip(
        torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        assert found.isfinite().all() and relative_error(found, right) < 10 * TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [1, 2])
def test_joined_calls_of_a_card(size: int) -> None:
    """bf16, heads of 128 channels, against fp64 of the same values, for whole rows and context-parallel ranks."""
    lengths, parents = [256, *[64, 32, 512], 128, 640, *[4, 8]], [-1, 0, 0, 0, -1, -1, 5, 5]
    edges = [0, *accumulate(lengths)]
    torch.manual_seed(0)
    shapes = [(edges[-1], heads, 128) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    ours = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in ours]
    expected = dense(*exact[:3], edges, parents)
    wanted = torch.autograd.grad(expected, exact[:3], exact[3])
    found = torch.zeros(shapes[0], device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")
    for rank in range(size):
        local = context_index(cu_seqlens, rank, size)
        calls = attention_calls(cu_seqlens, parents, rank, size)
        found = found.index_copy(0, local, joined_attention(ours[0][local], *ours[1:3], calls))
    gradients = torch.autograd.grad(found, ours[:3], ours[3])
    assert relative_error(found.cpu(), expected) < 2**-7
    for gradient, right in zip(gradients, wanted, strict=True):
        assert relative_error(gradient.cpu(), right) < 2**-6


def test_runs_are_padded_within_bounds() -> None:
    """One long and many short: not side by side; a mask is where one is needed."""
    lengths, parents = [200, *[8] * 9, 60, *[7, 9]], [-1, *[0] * 9, -1, 10, 10]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    own, parents_call = attention_calls(cu_seqlens, parents)
    for call in (own, parents_call):
        rows = torch.cat([runs.queries[runs.real] for runs in call.batches])
        assert rows.sort().values.tolist() == list(range(int(call.cu_queries[-1])))
        for runs in call.batches:
            wanted = sum(call.lengths[number][0] * call.lengths[number][1] for number in _runs(call, runs))
            assert runs.queries.numel() * runs.keys.shape[1] <= attention.MAX_PADDING * wanted
    assert all(runs.mask is None for runs in own.batches) and len(own.batches) == 2
    (joint,) = parents_call.batches  # 72 queries of 200 keys and 16 of 60
    assert joint.mask is not None and joint.mask.isfinite().sum().item() == 72 * (200 + 60)
    assert joint.real.sum(1).tolist() == [72, 16]


def _runs(call: attention.AttentionCall, runs: attention.PaddedRuns) -> list[int]:
    starts = runs.queries[:, 0].tolist()
    return [call.cu_queries.tolist().index(start) for start in starts]


def test_a_card_is_held_to_deterministic_kernels_where_torch_would_only_warn() -> None:
    state = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.raises(KeyError), deterministic_kernels():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)
        with deterministic_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(state[0], warn_only=state[1])


# ---------------------------------------------------------------- the policy
def random_families(processor: Processor, seed: int) -> list[TokenSequence]:
    """1 to 16 responses of 1 to 400 tokens to prompts of no image to several, in any order; texts that begin alike."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    sequences = []
    for group, (num_samples, longest) in enumerate([(1, 30), (16, 12), (number(2, 5), 400), (3, 40), (2, 5), (4, 20)]):
        sizes = [(28 * number(1, 3), 28 * number(1, 4)) for _ in range((0, 1, 2, 3)[(group + seed) % 4])]
        pixels = [torch.randint(0, 256, (*size, 3), generator=draw, dtype=torch.uint8).numpy() for size in sizes]
        images = tuple(processor.encode_image(Image.fromarray(array)) for array in pixels)
        ids = processor.prompt_ids(f"What is {group} and the sum of all digits?", len(images))
        asked = processor.expand(ids, [image.grid_thw for image in images])
        for _ in range(num_samples):
            own = [] if images else torch.randint(0, 300, (number(0, 6),), generator=draw).tolist()
            response = torch.randint(0, 300, (number(1, longest),), generator=draw).tolist()
            sequences.append(TokenSequence([*asked, *own], response, images, group))
    order = torch.randperm(len(sequences), generator=draw).tolist()
    return [sequences[place] for place in order]


def _step(policy: Any, config: Any, processor: Processor, sequences: list[TokenSequence], share: bool) -> Any:
    from megatron_sr1.weights import export_hf_weights

    batches: list[MicroBatch] = pack(
        sequences,
        max_tokens=1024,
        row_multiple=config.row_multiple,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
        share_prefix=share,
    )
    scores = policy.logprobs(batches, Scoring())
    pairs = [torch.stack([score.logprobs, score.entropy]) for score in scores]
    loss = MeanLoss(sum(len(sequence.response_ids) for sequence in sequences), bonus=0.2)
    result = policy.train_step([_with_entropy(batch) for batch in batches], loss, Scoring())
    gradients = export_hf_weights(
        policy.chunks, policy.architecture, policy.groups, read=lambda parameter: parameter.main_grad
    )
    return {
        "scores": gather_rows(pairs, batches, len(sequences)),
        "loss": torch.tensor(result.metrics["loss"]),
        "gradients": {name: gradient.clone() for name, gradient in gradients},
        "tokens": sum(len(batch.input_ids) for batch in batches),
        "images": sum(len(batch.images) for batch in batches),
    }


def _with_entropy(batch: MicroBatch) -> MicroBatch:
    return replace(batch, entropy_grad=True)


def _check_families(rank: int, num_ranks: int, folder: str) -> None:
    for number, family in enumerate(FAMILIES):
        processor = Processor.from_pretrained(f"{folder}/{family}")
        for seed in (2 * number, 2 * number + 1):
            sequences = random_families(processor, seed)
            steps = []
            for share in (False, True):
                overrides = ["layout.distributed_optimizer=false", "model.max_position=2048"]
                with built(f"{folder}/{family}", overrides) as (policy, config):
                    steps.append(_step(policy, config, processor, sequences, share))
            whole, shared = steps
            name = f"{family}, {seed}"
            assert shared["tokens"] < 0.8 * whole["tokens"] and shared["images"] <= whole["images"], name
            for index, (found, right) in enumerate(zip(shared["scores"], whole["scores"], strict=True)):
                assert relative_error(found[0], right[0]) < TOLERANCE, f"{name}: log-probs of {index}"
                assert relative_error(found[1], right[1]) < TOLERANCE, f"{name}: entropies of {index}"
            assert relative_error(shared["loss"], whole["loss"]) < TOLERANCE, name
            for key, gradient in shared["gradients"].items():
                error = relative_error(gradient, whole["gradients"][key])
                assert error < TOLERANCE, f"{name}: the gradient of {key} differs by {error}"


def test_random_families_are_their_sequences(tmp_path: Any) -> None:
    for family in FAMILIES:
        create_family(tmp_path / family, family)
    run_ranks(1, _check_families, str(tmp_path))
