"""Packed rows: positions, budgets, images, and every response token scored once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from benchmarks.packing import MAX_PIXELS, families, length_mix, quality, shared, singles
from megatron_sr1.ahead import Later
from megatron_sr1.packing import (
    bins,
    empty_row,
    gather_rows,
    image_starts,
    mrope_positions,
    pack,
    scatter_rows,
)
from megatron_sr1.packing.bins import Part, fill_rows
from megatron_sr1.packing.context import context_index
from megatron_sr1.types import EncodedImage, MicroBatch, Normalisation, TokenSequence

IMAGE, MERGE = 9, 2
GRIDS = ((1, 2, 2), (1, 4, 6), (1, 8, 2), (1, 6, 6))


def no_pixels() -> torch.Tensor:
    raise AssertionError("packing looks at grids only")


def make_image(grid: tuple[int, int, int]) -> EncodedImage:
    return EncodedImage(grid, Later(no_pixels), Normalisation(1.0, (0.0,), (1.0,)))


def make_sequence(images: tuple[EncodedImage, ...], text: list[int], response: list[int]) -> TokenSequence:
    """<1> image <2> <1> image <2> text, then the response."""
    prompt: list[int] = []
    for image in images:
        prompt += [1, *[IMAGE] * (image.grid_thw[1] * image.grid_thw[2] // MERGE**2), 2]
    return TokenSequence(prompt_ids=[*prompt, *text], response_ids=response, images=images)


def pack_all(sequences: list[TokenSequence], max_tokens: int, **options: int) -> list[MicroBatch]:
    return pack(
        sequences, max_tokens=max_tokens, image_token_id=IMAGE, merge_size=MERGE, **{"row_multiple": 1, **options}
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
    pool = [make_image(draw(st.sampled_from(GRIDS))) for _ in range(draw(st.integers(1, 3)))]
    token = st.integers(0, 12).filter(lambda token: token != IMAGE)
    any_token = st.integers(0, 12)
    asked = [draw(st.lists(token, min_size=1, max_size=8)) for _ in range(draw(st.integers(1, 5)))]
    images = st.lists(st.sampled_from(pool), max_size=2).map(tuple)
    shown = [draw(images) for _ in asked]
    questions = st.sampled_from(list(zip(shown, asked, strict=True)))
    sequences = [
        make_sequence(*draw(questions), draw(st.lists(any_token, max_size=10))) for _ in range(draw(st.integers(1, 9)))
    ]
    return [replace(item, group=draw(st.sampled_from([None, 0, 1]))) for item in sequences]


@settings(max_examples=150, deadline=None)
@given(
    sequences=batches_of_sequences(),
    multiples=st.sampled_from([(1, 1), (2, 1), (8, 1), (4, 4), (16, 4), (12, 6)]),
    extra=st.integers(0, 3),
    share=st.booleans(),
)
def test_rows_hold_every_sequence_whole(sequences, multiples: tuple[int, int], extra: int, share: bool):
    row_multiple, sequence_multiple = multiples
    longest = max(len(item.prompt_ids) + len(item.response_ids) for item in sequences)
    max_tokens = (-(-longest // row_multiple) + extra) * row_multiple
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bins, "LEAST_SHARED", 1)
        batches = pack_all(
            sequences,
            max_tokens,
            row_multiple=row_multiple,
            sequence_multiple=sequence_multiple,
            share_prefix=share,
        )
    scored = []
    for batch in batches:
        num_tokens = len(batch.input_ids)
        assert num_tokens <= max_tokens and num_tokens % row_multiple == 0
        assert batch.position_ids.shape == (3, num_tokens) and batch.visual_index.shape == (num_tokens,)
        assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[-1] == num_tokens
        assert batch.max_seqlen == batch.cu_seqlens.diff().max() and batch.cu_seqlens.diff().min() > 0
        assert not (batch.cu_seqlens % sequence_multiple).any()
        assert len(batch.parents) == len(batch.cu_seqlens) - 1
        whole = [number for number, parent in enumerate(batch.parents) if parent < 0]
        assert share or len(whole) == len(batch.parents)
        assert (batch.position_ids[:, batch.cu_seqlens[whole].long()] == 0).all()
        check_visual(batch)
        scored += list(zip(batch.row_sequence.tolist(), batch.row_offset.tolist(), strict=True))
        for row, target, index, offset in zip(
            batch.loss_rows.tolist(), batch.targets.tolist(), *batch_origin(batch), strict=True
        ):
            check_prediction(batch, sequences[index], row, target, offset)
        for index in set(batch.row_sequence.tolist()):
            if not share:
                check_segment(batch, index, sequences[index], sequence_multiple)
    expected = [(index, place) for index, item in enumerate(sequences) for place in range(len(item.response_ids))]
    assert sorted(scored) == expected  # each response token once


def batch_origin(batch: MicroBatch) -> tuple[list[int], list[int]]:
    return batch.row_sequence.tolist(), batch.row_offset.tolist()


def check_visual(batch: MicroBatch) -> None:
    """Anchors stand on image ids and use each visual token of the row's distinct images."""
    anchors = batch.visual_index[batch.visual_index >= 0]
    assert (batch.input_ids[batch.visual_index >= 0] == IMAGE).all()
    num_visual = sum(image.grid_thw[1] * image.grid_thw[2] // MERGE**2 for image in batch.images)
    assert set(anchors.tolist()) == set(range(num_visual))
    assert len({id(image) for image in batch.images}) == len(batch.images)


def check_segment(batch: MicroBatch, index: int, sequence: TokenSequence, multiple: int) -> None:
    """The sequence's images are its own; after it its padding, which goes on as text and ends with the segment."""
    row = int(batch.loss_rows[batch.row_sequence == index][0])
    number = int((batch.cu_seqlens <= row).sum()) - 1
    start, end = batch.cu_seqlens[number : number + 2].tolist()
    length = len(sequence.prompt_ids) + len(sequence.response_ids)
    assert end - start == -(-length // multiple) * multiple
    positions = batch.position_ids[:, start:end]
    assert not batch.input_ids[start + length : end].any()
    assert (positions[:, length - 1 :].diff() == 1).all()
    rows = {}
    first = 0
    for image in batch.images:
        size = image.grid_thw[1] * image.grid_thw[2] // MERGE**2
        rows[id(image)] = list(range(first, first + size))
        first += size
    visual = batch.visual_index[start:end]
    assert visual[visual >= 0].tolist() == [row for image in sequence.images for row in rows[id(image)]]


def check_prediction(batch: MicroBatch, sequence: TokenSequence, row: int, target: int, offset: int) -> None:
    """The scored token's context is its own sequence, from the first prompt token on, at its own positions."""
    number = int((batch.cu_seqlens <= row).sum()) - 1
    edges, parent = batch.cu_seqlens.tolist(), batch.parents[number]
    places = [*(range(*edges[parent : parent + 2]) if parent >= 0 else ()), *range(edges[number], row + 1)]
    context = [*sequence.prompt_ids, *sequence.response_ids[:offset]]
    assert batch.input_ids[places].tolist() == context
    assert target == sequence.response_ids[offset]
    positions = mrope_positions(sequence, image_token_id=IMAGE, merge_size=MERGE)
    assert torch.equal(batch.position_ids[:, places], positions[:, : len(context)])


def test_padding_of_a_row_is_a_segment_of_its_own():
    (batch,) = pack_all([TokenSequence([5, 6], [7])], 8, row_multiple=8)
    assert batch.cu_seqlens.tolist() == [0, 3, 8] and batch.max_seqlen == 5
    assert batch.input_ids.tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]] * 3
    assert batch.visual_index.tolist() == [-1] * 8
    assert (batch.loss_rows.tolist(), batch.targets.tolist()) == ([1], [7])


def test_padding_of_a_sequence_is_the_end_of_its_own_segment():
    """An image of 2 x 1 merged patches ends the prompt; the row's padding is as long as a sequence may be."""
    image = make_image((1, 4, 2))
    sequences = [TokenSequence([5, IMAGE, IMAGE], [7], (image,)), TokenSequence([5], [6, IMAGE, 8, 3])]
    (batch,) = pack_all(sequences, 24, row_multiple=8, sequence_multiple=4)
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 16] and batch.max_seqlen == 8
    assert batch.input_ids.tolist() == [5, IMAGE, IMAGE, 7, 5, 6, IMAGE, 8, 3, *[0] * 7]
    text = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert batch.position_ids.tolist() == [[0, 1, 1, 3, *text], [0, 1, 2, 3, *text], [0, 1, 1, 3, *text]]
    assert batch.visual_index.tolist() == [-1, 0, 1, *[-1] * 13]
    assert batch.images == (image,)
    assert batch.loss_rows.tolist() == [2, 4, 5, 6, 7] and batch.targets.tolist() == [7, 6, IMAGE, 8, 3]
    assert batch.row_sequence.tolist() == [0, 1, 1, 1, 1] and batch.row_offset.tolist() == [0, 0, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(sequences=batches_of_sequences(), size=st.sampled_from([1, 2, 4]))
def test_context_parallel_ranks_share_each_segment_and_its_work(sequences, size: int):
    multiple = 2 * size if size > 1 else 1
    for batch in pack_all(sequences, 96, row_multiple=multiple, sequence_multiple=multiple):
        parts = [context_index(batch.cu_seqlens, rank, size) for rank in range(size)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(batch.input_ids)))
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            mine = [part[(part >= start) & (part < end)] - start for part in parts]
            assert all((part.diff() > 0).all() for part in mine)
            assert len({int((part + 1).sum()) for part in mine}) == 1, (
                "a causal row of the mask has position + 1 entries"
            )


def test_an_empty_row_is_padding_only():
    empty = empty_row(8)
    assert empty.cu_seqlens.tolist() == [0, 8] and empty.max_seqlen == 8 and empty.images == ()
    assert empty.position_ids.tolist() == [list(range(8))] * 3
    assert empty.visual_index.tolist() == [-1] * 8 and not empty.input_ids.any()
    (batch,) = pack_all([TokenSequence([5], [6, 7])], 8)
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert vars(empty)[name].dtype == value.dtype, name
    values = [torch.rand(3, 2)]
    rows = scatter_rows(values, [empty, batch, empty])
    assert [row.shape for row in rows] == [(3, 0), (3, 2), (3, 0)]
    assert torch.equal(gather_rows(rows, [empty, batch, empty], 1)[0], values[0])
    with pytest.raises(ValueError, match="at least one token"):
        empty_row(0)


def test_siblings_share_their_image():
    """Two prompts of four samples each, given in turns; a row holds four: each image is encoded once."""
    first, second = make_image((1, 4, 6)), make_image((1, 4, 6))
    sequences = [make_sequence(((first, second)[index % 2],), [3], [4] * (1 + index)) for index in range(8)]
    length = sum(len(item.prompt_ids) + len(item.response_ids) for item in sequences[1::2])
    batches = pack_all(sequences, length)
    assert [batch.images for batch in batches] == [(second,), (first,)]
    equal_but_other = make_sequence((make_image((1, 4, 6)),), [3], [4])
    (batch,) = pack_all([sequences[0], equal_but_other], 64)
    assert len(batch.images) == 2  # identity counts, not content


def holders(sequences: list[TokenSequence], rows: list[list[Part]], images: list[EncodedImage]) -> list[int]:
    """Rows that encode each image."""
    inside = [[sequences[index] for part in row for index in part.indices] for row in rows]
    return [sum(any(image in sequence.images for sequence in row) for row in inside) for image in images]


def test_what_sequences_begin_with_is_there_once():
    """Four samples of a prompt of 20 tokens, and three texts of a group that begin alike, of which one by chance."""
    image = make_image((1, 4, 4))
    first = [make_sequence((image,), [3] * 16, [4] * (1 + number)) for number in range(4)]
    texts = [TokenSequence([5] * 17 + [number] * 3, [6] * 2, group=group) for number, group in enumerate((0, 0, 0, 1))]
    rows = fill_rows([*first, *texts], max_tokens=128, share_prefix=True)
    size = len(first[0].prompt_ids)
    assert rows == [[Part(size, (0, 1, 2, 3)), Part(17, (4, 5, 6)), Part(0, (7,))]]
    (batch,) = pack_all([*first, *texts], 128, share_prefix=True)
    assert batch.parents == (-1, 0, 0, 0, 0, -1, 5, 5, 5, -1)
    assert batch.cu_seqlens.diff().tolist() == [size, 1, 2, 3, 4, 17, 5, 5, 5, 22]
    (padded,) = pack_all([*first, *texts], 128, share_prefix=True, sequence_multiple=4, row_multiple=4)
    shared = size // 4 * 4
    rests = [size - shared + number for number in (1, 2, 3, 4)]
    assert padded.cu_seqlens.diff().tolist() == [
        *(shared, *(-(-rest // 4) * 4 for rest in rests)),
        *(16, 8, 8, 8, 24),
    ], "a prefix has no padding, its rest goes along"


def test_a_family_that_fits_no_row_repeats_its_prefix():
    sequences = [TokenSequence([7] * 40, [1] * 20) for _ in range(5)]
    assert fill_rows(sequences, max_tokens=100, share_prefix=True) == [
        [Part(40, (0, 1, 2))],
        [Part(40, (3, 4))],
    ]
    with pytest.raises(ValueError, match="sequence 0 has 60 tokens"):
        fill_rows(sequences, max_tokens=59, share_prefix=True)


def test_no_more_families_than_needed_are_broken_up():
    """Eight families of 2 x 30 tokens fill eight rows of 100 by 60 %; six rows do if the two smallest are seen twice.

    With text that fits the gaps, eight rows are full and no family is touched.
    """
    grids = ((1, 4, 6), (1, 2, 2), (1, 6, 6), (1, 8, 2), (1, 2, 4), (1, 4, 6), (1, 8, 2), (1, 6, 6))
    images = [make_image(grid) for grid in grids]
    sequences = []
    for image in images * 2:
        start = make_sequence((image,), [3], [])
        sequences.append(make_sequence((image,), [3], [4] * (30 - len(start.prompt_ids))))
    rows = fill_rows(sequences, max_tokens=100)
    assert len(rows) == 6 and holders(sequences, rows, images) == [1, 2, 1, 1, 2, 1, 1, 1]
    sequences += [TokenSequence([1] * 38, [2]) for _ in images]
    rows = fill_rows(sequences, max_tokens=100)
    assert len(rows) == 8 and holders(sequences, rows, images) == [1] * 8


def test_one_part_filled_row_breaks_up_no_family():
    """Families of 2 x 33, 2 x 33 and 2 x 32 tokens: two rows of 100 could hold 3 x 33 and 33 + 2 x 32."""
    images = [make_image((1, 2, 2)) for _ in range(3)]
    parts = [(image, num_text) for image, num_text in zip(images, (30, 30, 29), strict=True) for _ in range(2)]
    sequences = [make_sequence((image,), [3] * num_text, []) for image, num_text in parts]
    rows = fill_rows(sequences, max_tokens=100)
    assert len(rows) == 3 and holders(sequences, rows, images) == [1, 1, 1]
    assert len(fill_rows([replace(item, images=()) for item in sequences], max_tokens=100)) == 2


def test_rows_are_filled():
    """Short sequences without images go where the long ones leave room."""
    sequences = [TokenSequence([1], [2] * size) for size in (59, 39, 49, 49, 89, 9)]
    assert [batch.cu_seqlens[-1].item() for batch in pack_all(sequences, 100)] == [100, 100, 100]


def test_rows_are_planned_with_padded_lengths():
    """Two sequences of 5 take 16 of a row's 16 tokens when padded to 8, and leave none for the third."""
    sequences = [TokenSequence([1], [2] * 4) for _ in range(3)]
    rows = [fill_rows(sequences, max_tokens=16, sequence_multiple=multiple) for multiple in (1, 8)]
    assert rows == [[[Part(0, (0,)), Part(0, (1,)), Part(0, (2,))]], [[Part(0, (0,)), Part(0, (1,))], [Part(0, (2,))]]]


def test_packing_is_deterministic():
    """Of equal input, not of the same objects."""

    def sequences() -> list[TokenSequence]:
        images = [make_image(GRIDS[index % 4]) for index in range(6)]
        return [make_sequence((images[index % 6],), [3] * (1 + index % 3), [4] * (index % 5)) for index in range(40)]

    one, two = pack_all(sequences(), 40), pack_all(sequences(), 40)
    assert all(torch.equal(a.row_sequence, b.row_sequence) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_realistic_mix_fills_rows(seed: int):
    """Real tokens are 95 % of what is computed, and of what all rows but one could hold, second passes there or not."""
    both = length_mix(48, seed)
    for sequences in (both, [item for item in both if item.images]):
        for max_tokens in (8192, 16384, 32768):
            rows = families(sequences, max_tokens)
            found, apart = (quality(sequences, r, max_tokens, 2048) for r in (rows, singles(sequences, max_tokens)))
            assert found.share_of_budget * found.num_rows / max(1, found.num_rows - 1) >= 0.95
            assert found.share_of_rows >= 0.95
            assert found.patches < 0.7 * apart.patches
            assert found.num_rows <= 1.05 * found.least_rows + 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_a_realistic_mix_no_prompt_is_trained_twice(seed: int):
    """Tokens, and images encoded, are at most 1.02 of what there is, prompts of 4 megapixels or not."""
    mix, large = (length_mix(48, seed, least_pixels=pixels) for pixels in (0, MAX_PIXELS))
    for sequences in (mix, [item for item in mix if item.images], large):
        found = quality(sequences, shared(sequences, 16384), 16384, 2048)
        assert found.tokens <= 1.02 and found.patches <= 1.02


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((3, 20), {"max_tokens": 16}, "sequence 1 has 20 tokens, more than the max_tokens=16"),
        (
            (3, 9),
            {"max_tokens": 8, "row_multiple": 8, "sequence_multiple": 4},
            r"sequence 1 has 9 tokens \(12 when padded to a multiple of 4\), more than the max_tokens=8",
        ),
        ((3,), {"max_tokens": 12, "row_multiple": 8}, "max_tokens=12 .* multiple of row_multiple=8"),
        ((3,), {"max_tokens": 0, "row_multiple": 8}, "max_tokens=0"),
        (
            (3,),
            {"max_tokens": 12, "row_multiple": 6, "sequence_multiple": 4},
            "row_multiple=6 .* multiple of sequence_multiple=4",
        ),
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
