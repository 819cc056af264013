"""Packed rows: positions, budgets, images, and every response token scored once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from megatron_sr1.packing import (
    gather_rows,
    image_starts,
    mrope_positions,
    pack,
    scatter_rows,
    split_for_ranks,
)
from megatron_sr1.types import EncodedImage, MicroBatch, TokenSequence

IMAGE, MERGE = 9, 2
GRIDS = ((1, 2, 2), (1, 4, 6), (1, 8, 2), (1, 6, 6))


def make_image(grid: tuple[int, int, int], value: float = 0.0) -> EncodedImage:
    return EncodedImage(torch.full((grid[1] * grid[2], 3), value), grid)


def make_sequence(images: tuple[EncodedImage, ...], text: list[int], response: list[int]) -> TokenSequence:
    """<1> image <2> <1> image <2> text, then the response."""
    prompt: list[int] = []
    for image in images:
        prompt += [1, *[IMAGE] * (image.grid_thw[1] * image.grid_thw[2] // MERGE**2), 2]
    return TokenSequence(prompt_ids=[*prompt, *text], response_ids=response, images=images)


def pack_all(sequences: list[TokenSequence], max_tokens: int, **options: int) -> list[MicroBatch]:
    return pack(
        sequences, max_tokens=max_tokens, image_token_id=IMAGE, merge_size=MERGE, **{"pad_multiple": 1, **options}
    )


# ---------------------------------------------------------------- positions
@pytest.fixture(scope="module")
def reference() -> Qwen2_5_VLModel:
    """transformers' rope index needs a configuration only."""
    model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2_5_VLConfig(vision_config={"spatial_merge_size": MERGE})
    return model


@pytest.mark.parametrize("grids", [(), ((1, 4, 6),), ((1, 8, 2), (1, 2, 2), (1, 4, 6)), ((1, 6, 6),) * 2])
@pytest.mark.parametrize("num_text", [1, 7])
def test_positions_are_transformers(reference: Qwen2_5_VLModel, grids, num_text: int):
    sequence = make_sequence(tuple(make_image(grid) for grid in grids), [3] * num_text, [4, 5, 6])
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
    expected, _ = reference.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=torch.tensor(grids) if grids else None
    )
    positions = mrope_positions(sequence, image_token_id=IMAGE, merge_size=MERGE)
    assert torch.equal(positions, expected[:, 0])


def test_image_ids_without_an_image_are_text():
    """The policy sampled the placeholder, or a prompt without images holds it."""
    plain = TokenSequence([1, IMAGE, 3], [IMAGE, IMAGE])
    assert torch.equal(mrope_positions(plain, image_token_id=IMAGE, merge_size=MERGE), torch.arange(5).expand(3, 5))
    image = make_image((1, 4, 6))
    sampled = make_sequence((image,), [3], [IMAGE, 4, IMAGE])
    (batch,) = pack_all([plain, sampled], 64)
    assert (batch.visual_index >= 0).sum() == 6
    assert torch.equal(batch.visual_index[5 + 1 : 5 + 7], torch.arange(6))
    last = mrope_positions(sampled, image_token_id=IMAGE, merge_size=MERGE)[:, -3:]
    assert torch.equal(last, last[:1].expand(3, 3)) and torch.equal(last[0].diff(), torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("prompt", "grid", "message"),
    [
        ([1, IMAGE, IMAGE, 3], (1, 4, 6), "2 image tokens for 1 images"),
        ([1, IMAGE, 3], (2, 2, 2), "time must be 1"),
        ([1, IMAGE, 3], (1, 2, 3), "multiples of merge_size=2"),
        ([IMAGE, 3, IMAGE], (1, 4, 2), "in one run"),
    ],
)
def test_images_that_do_not_fit_the_prompt(prompt, grid, message: str):
    with pytest.raises(ValueError, match=message):
        image_starts(TokenSequence(prompt, [4], (make_image(grid),)), image_token_id=IMAGE, merge_size=MERGE)


# ---------------------------------------------------------------- rows
@st.composite
def batches_of_sequences(draw: st.DrawFn) -> list[TokenSequence]:
    pool = [make_image(draw(st.sampled_from(GRIDS)), value) for value in range(draw(st.integers(1, 3)))]
    token = st.integers(0, 12).filter(lambda token: token != IMAGE)
    any_token = st.integers(0, 12)
    return [
        make_sequence(
            tuple(draw(st.lists(st.sampled_from(pool), max_size=2))),
            draw(st.lists(token, min_size=1, max_size=8)),
            draw(st.lists(any_token, max_size=10)),
        )
        for _ in range(draw(st.integers(1, 9)))
    ]


@settings(max_examples=150, deadline=None)
@given(sequences=batches_of_sequences(), pad_multiple=st.sampled_from([1, 2, 8]), extra=st.integers(0, 3))
def test_rows_hold_every_sequence_whole(sequences, pad_multiple: int, extra: int):
    longest = max(len(item.prompt_ids) + len(item.response_ids) for item in sequences)
    max_tokens = (-(-longest // pad_multiple) + extra) * pad_multiple
    batches = pack_all(sequences, max_tokens, pad_multiple=pad_multiple)
    scored = []
    for batch in batches:
        num_tokens = len(batch.input_ids)
        assert num_tokens <= max_tokens and num_tokens % pad_multiple == 0
        assert batch.position_ids.shape == (3, num_tokens) and batch.visual_index.shape == (num_tokens,)
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[-1] == num_tokens
        assert batch.max_seqlen == batch.cu_seqlens.diff().max() and batch.cu_seqlens.diff().min() > 0
        assert (batch.position_ids[:, batch.cu_seqlens[:-1].long()] == 0).all()
        check_visual(batch)
        scored += list(zip(batch.row_sequence.tolist(), batch.row_offset.tolist(), strict=True))
        for row, target, index, offset in zip(
            batch.loss_rows.tolist(), batch.targets.tolist(), *batch_origin(batch), strict=True
        ):
            check_prediction(batch, sequences[index], row, target, offset)
    expected = [(index, place) for index, item in enumerate(sequences) for place in range(len(item.response_ids))]
    assert sorted(scored) == expected  # each response token once


def batch_origin(batch: MicroBatch) -> tuple[list[int], list[int]]:
    return batch.row_sequence.tolist(), batch.row_offset.tolist()


def check_visual(batch: MicroBatch) -> None:
    """Anchors stand on image ids and use each visual token of the row; images with equal values are one object."""
    anchors = batch.visual_index[batch.visual_index >= 0]
    assert (batch.input_ids[batch.visual_index >= 0] == IMAGE).all()
    if batch.pixel_values is None:
        assert batch.image_grid_thw is None and len(anchors) == 0
        return
    num_visual = batch.image_grid_thw.prod(dim=1) // MERGE**2
    assert set(anchors.tolist()) == set(range(int(num_visual.sum())))
    assert len(batch.pixel_values) == batch.image_grid_thw.prod(dim=1).sum()
    values = [patches[0, 0].item() for patches in batch.pixel_values.split(batch.image_grid_thw.prod(dim=1).tolist())]
    assert len(set(values)) == len(values)


def check_prediction(batch: MicroBatch, sequence: TokenSequence, row: int, target: int, offset: int) -> None:
    """The scored token's context is its own sequence, from the first prompt token on, at its own positions."""
    start = batch.cu_seqlens[batch.cu_seqlens <= row].max().item()
    context = [*sequence.prompt_ids, *sequence.response_ids[:offset]]
    assert batch.input_ids[start : row + 1].tolist() == context
    assert target == sequence.response_ids[offset]
    positions = mrope_positions(sequence, image_token_id=IMAGE, merge_size=MERGE)
    assert torch.equal(batch.position_ids[:, start : row + 1], positions[:, : len(context)])


def test_padding_is_a_segment_of_its_own():
    (batch,) = pack_all([TokenSequence([5, 6], [7])], 8, pad_multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 3, 8] and batch.max_seqlen == 5
    assert batch.input_ids.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]] * 3
    assert batch.visual_index.tolist() == [-1] * 8
    assert (batch.loss_rows.tolist(), batch.targets.tolist()) == ([1], [7])


def test_siblings_share_their_image():
    """Two prompts of four samples each, given in turns; a row holds four: each image is encoded once."""
    first, second = make_image((1, 4, 6), 1.0), make_image((1, 4, 6), 2.0)
    sequences = [make_sequence(((first, second)[index % 2],), [3], [4] * (1 + index)) for index in range(8)]
    length = sum(len(item.prompt_ids) + len(item.response_ids) for item in sequences[1::2])
    batches = pack_all(sequences, length)
    assert [len(batch.image_grid_thw) for batch in batches] == [1, 1]
    assert {batch.pixel_values.unique().item() for batch in batches} == {1.0, 2.0}
    equal_but_other = make_sequence((make_image((1, 4, 6), 1.0),), [3], [4])
    (batch,) = pack_all([sequences[0], equal_but_other], 64)
    assert len(batch.image_grid_thw) == 2  # identity counts, not content


def test_rows_are_filled():
    """Short sequences without images go where the long ones leave room."""
    sequences = [TokenSequence([1], [2] * size) for size in (59, 39, 49, 49, 89, 9)]
    assert [batch.cu_seqlens[-1].item() for batch in pack_all(sequences, 100)] == [100, 100, 100]


def test_packing_is_deterministic():
    sequences = [make_sequence((), [3] * (1 + index % 3), [4] * (index % 5)) for index in range(12)]
    one, two = pack_all(sequences, 16), pack_all(sequences, 16)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((3, 20), {"max_tokens": 16}, "sequence 1 has 20 tokens, more than the max_tokens=16"),
        ((3,), {"max_tokens": 12, "pad_multiple": 8}, "multiple of pad_multiple=8"),
    ],
)
def test_what_cannot_be_packed(sizes, options, message: str):
    with pytest.raises(ValueError, match=message):
        pack_all([TokenSequence([1], [2] * (size - 1)) for size in sizes], **options)


def test_a_sequence_without_prompt():
    with pytest.raises(ValueError, match="sequence 1 has no prompt token"):
        pack_all([TokenSequence([1], [2]), TokenSequence([], [2])], 8)


# ---------------------------------------------------------------- tokens
@settings(max_examples=80, deadline=None)
@given(sequences=batches_of_sequences(), streams=st.sampled_from([(), (3,)]))
def test_scatter_then_gather_is_the_identity(sequences, streams: tuple[int, ...]):
    batches = pack_all(sequences, 64)
    values = [torch.rand(*streams, len(item.response_ids)) for item in sequences]
    rows = scatter_rows(values, batches)
    assert [row.shape for row in rows] == [(*streams, len(batch.targets)) for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(gather_rows(rows, batches, len(values)), values, strict=True))


@settings(max_examples=80, deadline=None)
@given(sequences=batches_of_sequences())
def test_gathered_targets_are_the_responses(sequences):
    batches = pack_all(sequences, 64)
    gathered = gather_rows([batch.targets for batch in batches], batches, len(sequences))
    assert [value.tolist() for value in gathered] == [list(item.response_ids) for item in sequences]


def test_gather_rejects_wrong_rows():
    batches = pack_all([TokenSequence([1], [2, 3]), TokenSequence([1], [4])], 4)
    values = [batch.targets.float() for batch in batches]
    with pytest.raises(ValueError, match="1 values for 2 rows"):
        gather_rows(values[:1], batches, 2)
    with pytest.raises(ValueError, match="row 0 have shape"):
        gather_rows([torch.cat(values), values[1]], batches, 2)
    with pytest.raises(ValueError, match="there twice"):
        gather_rows([values[0], values[0]], [batches[0], batches[0]], 2)
    with pytest.raises(ValueError, match="num_sequences=1"):
        gather_rows(values, batches, 1)
    with pytest.raises(ValueError, match=r"\[2, 2\] values for \[2, 1\]"):
        scatter_rows([torch.zeros(2), torch.zeros(2)], batches)


def test_gradients_flow_through_gather():
    batches = pack_all([TokenSequence([1], [2, 3]), TokenSequence([1], [4])], 8)
    value = torch.arange(3.0, requires_grad=True)
    gather_rows([value], batches, 2)[1].sum().backward()
    assert value.grad.tolist() == (batches[0].row_sequence == 1).float().tolist()


# ---------------------------------------------------------------- ranks
@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 500), max_size=40), num_ranks=st.integers(1, 8))
def test_split_for_ranks(lengths: list[int], num_ranks: int):
    ranks = split_for_ranks(lengths, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(index for rank in ranks for index in rank) == list(range(len(lengths)))
    assert all(rank == sorted(rank) for rank in ranks)
    assert sum(bool(rank) for rank in ranks) == min(num_ranks, len(lengths))
    loads = [sum(lengths[index] for index in rank) for rank in ranks]
    # longest-first: a rank's load exceeds another's by its last item at most
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_split_deals_the_longest_first():
    assert split_for_ranks([10, 10, 20], 2) == [[2], [0, 1]]


def test_split_for_no_ranks():
    with pytest.raises(ValueError, match="num_ranks=0"):
        split_for_ranks([1], 0)
