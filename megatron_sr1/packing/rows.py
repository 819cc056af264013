"""Packed rows: several sequences in one, told apart by cu_seqlens.

    row  =  [ sequence, its padding | sequence, its padding | ... | padding of the row ]

Context parallelism cuts every sequence into equal pieces, so each is padded to a multiple of `sequence_multiple`. That
padding is the end of the sequence's own segment: attention is causal, so no token sees it. The row is padded to a
multiple of `row_multiple` by a segment of its own: to stretch the last sequence's instead would make that longer than
its token count, and attention and positions with it. Padding has id 0, stands for no visual token and is not scored.
Shape legend: `megatron_sr1.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sr1.packing.bins import fill_rows, sequence_length
from megatron_sr1.packing.positions import image_starts, mrope_positions, num_visual_tokens
from megatron_sr1.types import EncodedImage, MicroBatch, TokenSequence


def pack(
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    row_multiple: int,
    sequence_multiple: int = 1,
    image_token_id: int,
    merge_size: int,
) -> list[MicroBatch]:
    """Packs sequences into rows of at most max_tokens tokens, padding included.

    An image object that several sequences of a row hold is in the row's images once. No pixel is read: only grids. The
    same arguments always give the same rows.

    Args:
        sequences: each with at least one prompt token, which the first response token is predicted from.
        row_multiple: rows are padded to a multiple of it (`Config.row_multiple`), itself one of sequence_multiple.
        sequence_multiple: and the sequences in them to a multiple of this (`Config.sequence_multiple`).

    Raises:
        ValueError: a sequence is too long or has no prompt; images and image ids do not fit together; max_tokens is
            no multiple of row_multiple, or that none of sequence_multiple.
    """
    for name, value, unit_name, unit in (
        ("row_multiple", row_multiple, "sequence_multiple", sequence_multiple),
        ("max_tokens", max_tokens, "row_multiple", row_multiple),
    ):
        if unit < 1 or value < 1 or value % unit:
            raise ValueError(
                f"{name}={value} is not allowed: it must be a positive multiple of {unit_name}={unit}, for padded rows "
                "stay within the budget and hold whole sequences. Round it to one."
            )
    for index, sequence in enumerate(sequences):
        if not sequence.prompt_ids:
            raise ValueError(f"sequence {index} has no prompt token; the first response token is predicted from one.")
    layout = fill_rows(sequences, max_tokens=max_tokens, sequence_multiple=sequence_multiple)
    places = _Places(row_multiple, sequence_multiple, image_token_id, merge_size)
    return [_pack_row(sequences, row, places) for row in layout]


def empty_row(num_tokens: int) -> MicroBatch:
    """A row of padding only: a schedule runs it like any other, and it adds nothing to the loss.

    For ranks that must take part in as many micro-batches as their neighbours and have fewer sequences.

    Args:
        num_tokens: a multiple of the row_multiple of the rows it goes with.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} is not allowed: a row has at least one token.")
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int64),
        position_ids=torch.arange(num_tokens).repeat(3, 1),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        max_seqlen=num_tokens,
        visual_index=torch.full((num_tokens,), -1),
        images=(),
        loss_rows=none,
        targets=none,
        row_sequence=none,
        row_offset=none,
    )


@dataclass(frozen=True)
class _Places:
    """What a row's shape depends on, besides its sequences."""

    row_multiple: int
    sequence_multiple: int
    image_token_id: int
    merge_size: int


def moved(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The row with its tensors on `device`; images stay where they are, for only the rank that encodes one needs it."""
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **{name: value.to(device) for name, value in tensors.items()})


def _pack_row(sequences: Sequence[TokenSequence], indices: list[int], places: _Places) -> MicroBatch:
    chosen = [sequences[index] for index in indices]
    pads = [-sequence_length(item) % places.sequence_multiple for item in chosen]
    lengths = [sequence_length(item) + num_pad for item, num_pad in zip(chosen, pads, strict=True)]
    tail = -sum(lengths) % places.row_multiple
    segments = lengths + [tail] * (tail > 0)
    starts = torch.tensor([0, *segments], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    images = _RowImages(places.merge_size)
    responses = [torch.tensor(list(item.response_ids), dtype=torch.int64) for item in chosen]
    offsets = [torch.arange(len(response)) for response in responses]
    tail_ids = torch.zeros(tail, dtype=torch.int64)
    ids, positions, visual, loss_rows = [], [], [], []
    for item, response, num_pad, start in zip(chosen, responses, pads, starts.tolist(), strict=False):
        prompt = torch.tensor(list(item.prompt_ids), dtype=torch.int64)
        ids += [prompt, response, torch.zeros(num_pad, dtype=torch.int64)]
        where = {"image_token_id": places.image_token_id, "merge_size": places.merge_size}
        positions.append(mrope_positions(item, **where, num_pad=num_pad))
        visual.append(_visual_index(item, images, places.image_token_id, num_pad))
        loss_rows.append(start + len(prompt) - 1 + torch.arange(len(response)))
    return MicroBatch(
        input_ids=torch.cat([*ids, tail_ids]),
        position_ids=torch.cat([*positions, torch.arange(tail).expand(3, tail)], dim=1),
        cu_seqlens=starts,
        max_seqlen=max(segments),
        visual_index=torch.cat([*visual, tail_ids - 1]),
        images=tuple(images.distinct),
        loss_rows=torch.cat(loss_rows),
        targets=torch.cat(responses),
        row_sequence=torch.cat(
            [torch.full_like(offset, index) for index, offset in zip(indices, offsets, strict=True)]
        ),
        row_offset=torch.cat(offsets),
    )


@dataclass
class _RowImages:
    """The distinct images of a row, in the order of first use."""

    merge_size: int
    distinct: list[EncodedImage] = field(default_factory=list)
    num_visual: int = 0  # visual tokens of `distinct`
    _first_rows: dict[int, int] = field(default_factory=dict)  # by identity: an image's first visual token

    def rows_of(self, image: EncodedImage) -> Tensor:
        """Which of the row's visual tokens are this image's: [visual tokens of the image] int64."""
        size = num_visual_tokens(image.grid_thw, self.merge_size)
        if id(image) not in self._first_rows:
            self._first_rows[id(image)] = self.num_visual
            self.distinct.append(image)
            self.num_visual += size
        first = self._first_rows[id(image)]
        return torch.arange(first, first + size)


def _visual_index(sequence: TokenSequence, images: _RowImages, image_token_id: int, num_pad: int) -> Tensor:
    """[n + num_pad] int64: the visual token that each token of the sequence stands for, -1 for text and padding."""
    index = torch.full((sequence_length(sequence) + num_pad,), -1)
    starts = image_starts(sequence, image_token_id=image_token_id, merge_size=images.merge_size)
    for start, image in zip(starts, sequence.images, strict=True):
        rows = images.rows_of(image)
        index[start : start + len(rows)] = rows
    return index
