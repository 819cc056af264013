"""Packed rows: several sequences in one, told apart by cu_seqlens.

Shape legend: `megatron_sr1.types`. A row is [sequence | sequence | ... | padding]; the padding is a segment of its own,
so that no token attends to it, and holds no loss row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sr1.packing.bins import fill_rows, sequence_length
from megatron_sr1.packing.positions import image_starts, mrope_positions, num_visual_tokens
from megatron_sr1.types import EncodedImage, MicroBatch, TokenSequence


def pack(
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    pad_multiple: int,
    image_token_id: int,
    merge_size: int,
) -> list[MicroBatch]:
    """Packs sequences into rows of at most max_tokens tokens, padding included.

    An image object that several sequences of a row hold is in the row's pixel_values once. The same arguments always
    give the same rows.

    Args:
        sequences: each with at least one prompt token, which the first response token is predicted from.
        pad_multiple: rows are padded to a multiple of it (for example the tensor-parallel size).

    Raises:
        ValueError: a sequence is too long or has no prompt; images and image ids do not fit together; max_tokens is
            no multiple of pad_multiple.
    """
    if pad_multiple < 1 or max_tokens % pad_multiple:
        raise ValueError(
            f"max_tokens={max_tokens} is not allowed: it must be a multiple of pad_multiple={pad_multiple}, for padded "
            "rows stay within it. Round it up."
        )
    for index, sequence in enumerate(sequences):
        if not sequence.prompt_ids:
            raise ValueError(f"sequence {index} has no prompt token; the first response token is predicted from one.")
    layout = fill_rows(sequences, max_tokens=max_tokens)
    return [_pack_row(sequences, row, pad_multiple, image_token_id, merge_size) for row in layout]


def _pack_row(
    sequences: Sequence[TokenSequence], indices: list[int], pad_multiple: int, image_token_id: int, merge_size: int
) -> MicroBatch:
    lengths = [sequence_length(sequences[index]) for index in indices]
    num_pad = -sum(lengths) % pad_multiple
    segments = lengths + [num_pad] * (num_pad > 0)
    pad = torch.arange(num_pad)
    chosen = [sequences[index] for index in indices]
    images = _RowImages(merge_size)
    responses = [torch.tensor(list(sequence.response_ids), dtype=torch.int64) for sequence in chosen]
    prompts = [torch.tensor(list(sequence.prompt_ids), dtype=torch.int64) for sequence in chosen]
    ids = [part for pair in zip(prompts, responses, strict=True) for part in pair]
    positions = [mrope_positions(item, image_token_id=image_token_id, merge_size=merge_size) for item in chosen]
    visual = [_visual_index(item, images, image_token_id) for item in chosen]
    offsets = [torch.arange(len(response)) for response in responses]
    starts = torch.tensor([0, *segments], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    before = [start + len(prompt) - 1 for start, prompt in zip(starts.tolist(), prompts, strict=False)]
    return MicroBatch(
        input_ids=torch.cat([*ids, torch.zeros_like(pad)]),
        position_ids=torch.cat([*positions, pad.expand(3, num_pad)], dim=1),
        cu_seqlens=starts,
        max_seqlen=max(segments),
        visual_index=torch.cat([*visual, torch.full_like(pad, -1)]),
        pixel_values=torch.cat([image.pixel_values for image in images.distinct]) if images.distinct else None,
        image_grid_thw=torch.tensor([image.grid_thw for image in images.distinct]) if images.distinct else None,
        loss_rows=torch.cat([first + offset for first, offset in zip(before, offsets, strict=True)]),
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


def _visual_index(sequence: TokenSequence, images: _RowImages, image_token_id: int) -> Tensor:
    """[n] int64: the visual token that each token of the sequence stands for, -1 for text."""
    index = torch.full((sequence_length(sequence),), -1)
    starts = image_starts(sequence, image_token_id=image_token_id, merge_size=images.merge_size)
    for start, image in zip(starts, sequence.images, strict=True):
        rows = images.rows_of(image)
        index[start : start + len(rows)] = rows
    return index
