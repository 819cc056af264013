"""Packed rows: several sequences in one, told apart by cu_seqlens.

    row  =  [ sequence, its padding | ... | prefix | rest, its padding | rest, its padding | ... | padding of the row ]

What sequences begin with alike may be a segment of its own, which the segments of their rests see whole. Context
parallelism cuts every segment into equal pieces, so each is padded to a multiple of `sequence_multiple`. That padding
is the end of a segment that no other sees: attention is causal, so no token sees it; a prefix has none, it ends where a
multiple does. The row is padded to a multiple of `row_multiple` by a segment of its own: to stretch the last sequence's
instead would make that longer than its token count, and attention and positions with it. Padding has id 0, stands for
no visual token and is not scored.
Shape legend: `megatron_sr1.types`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sr1.packing.bins import Part, fill_rows, sequence_length
from megatron_sr1.packing.positions import image_starts, mrope_positions, num_visual_tokens
from megatron_sr1.types import EncodedImage, MicroBatch, Routing, TokenSequence


def pack(
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    row_multiple: int,
    sequence_multiple: int = 1,
    image_token_id: int,
    merge_size: int,
    share_prefix: bool = False,
) -> list[MicroBatch]:
    """Packs sequences into rows of at most max_tokens tokens, padding included.

    An image object that several sequences of a row hold is in the row's images once. No pixel is read: only grids. The
    same arguments always give the same rows.

    Args:
        sequences: each with at least one prompt token, which the first response token is predicted from.
        row_multiple: rows are padded to a multiple of it (`Config.row_multiple`), itself one of sequence_multiple.
        sequence_multiple: and the segments in them to a multiple of this (`Config.sequence_multiple`).
        share_prefix: what sequences begin with alike is in a row once, see `bins.families`.

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
    options = {"sequence_multiple": sequence_multiple, "share_prefix": share_prefix}
    layout = fill_rows(sequences, max_tokens=max_tokens, **options)
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
        parents=(-1,),
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


def _pack_row(sequences: Sequence[TokenSequence], parts: Sequence[Part], places: _Places) -> MicroBatch:
    row = _Row(places)
    for part in parts:
        prefix, parent = torch.zeros(0, dtype=torch.int64), -1
        tokens = [row.tokens_of(sequences[index]) for index in part.indices]
        if part.shared:
            parent = row.num_segments
            prefix = row.add(tokens[0].of(slice(part.shared)))
        for index, its_tokens in zip(part.indices, tokens, strict=True):
            rest = row.add(its_tokens.of(slice(part.shared, None)), parent)
            row.score(index, sequences[index], torch.cat([prefix, rest]))
    return row.batch()


@dataclass(frozen=True)
class _Tokens:
    """Of a segment."""

    ids: Tensor  # [n] int64
    positions: Tensor  # [3, n] int64
    visual: Tensor  # [n] int64: the visual token of the row that each stands for, -1 for text and padding
    experts: Tensor | None = None  # [m, M, k] of the first m of them, see `TokenSequence`

    def of(self, chosen: slice) -> _Tokens:
        experts = None if self.experts is None else self.experts[chosen]
        return _Tokens(self.ids[chosen], self.positions[:, chosen], self.visual[chosen], experts)


class _Row:
    """A row that is being filled, segment after segment."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self._images = _RowImages(places.merge_size)
        self._segments: list[_Tokens] = []
        self._parents: list[int] = []
        self._num_tokens = 0
        self._scored: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # rows, targets, sequences and offsets, [R] each

    @property
    def num_segments(self) -> int:
        return len(self._segments)

    def tokens_of(self, sequence: TokenSequence) -> _Tokens:
        """Prompt, response and padding."""
        num_pad = -sequence_length(sequence) % self._places.sequence_multiple
        where = {"image_token_id": self._places.image_token_id, "merge_size": self._places.merge_size}
        return _Tokens(
            torch.tensor([*sequence.prompt_ids, *sequence.response_ids, *[0] * num_pad], dtype=torch.int64),
            mrope_positions(sequence, **where, num_pad=num_pad),
            _visual_index(sequence, self._images, self._places.image_token_id, num_pad),
            sequence.experts,
        )

    def add(self, tokens: _Tokens, parent: int = -1) -> Tensor:
        """A segment; returns where its tokens are: [n] int64."""
        start = self._num_tokens
        if len(tokens.ids):
            self._segments.append(tokens)
            self._parents.append(parent)
            self._num_tokens += len(tokens.ids)
        return torch.arange(start, self._num_tokens)

    def score(self, index: int, sequence: TokenSequence, places: Tensor) -> None:
        """Has the responses of a sequence scored, whose tokens are at `places`."""
        targets = torch.tensor(list(sequence.response_ids), dtype=torch.int64)
        before = len(sequence.prompt_ids) - 1
        offsets = torch.arange(len(targets))
        rows = places[before : before + len(targets)]
        self._scored.append((rows, targets, torch.full_like(offsets, index), offsets))

    def batch(self) -> MicroBatch:
        tail = -self._num_tokens % self._places.row_multiple
        none = torch.full((tail,), -1)
        self.add(_Tokens(torch.zeros(tail, dtype=torch.int64), torch.arange(tail).expand(3, tail), none))
        lengths = [len(segment.ids) for segment in self._segments]
        loss_rows, targets, row_sequence, row_offset = map(torch.cat, zip(*self._scored, strict=True))
        return MicroBatch(
            input_ids=torch.cat([segment.ids for segment in self._segments]),
            position_ids=torch.cat([segment.positions for segment in self._segments], dim=1),
            cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            max_seqlen=max(lengths),
            parents=tuple(self._parents),
            visual_index=torch.cat([segment.visual for segment in self._segments]),
            images=tuple(self._images.distinct),
            loss_rows=loss_rows,
            targets=targets,
            row_sequence=row_sequence,
            row_offset=row_offset,
            routing=_given(self._segments),
        )


def _given(segments: Sequence[_Tokens]) -> Routing | None:
    """None where nobody knows the experts of a token."""
    known = [segment.experts for segment in segments if segment.experts is not None]
    if not known:
        return None
    num_tokens = sum(len(segment.ids) for segment in segments)
    given = known[0].new_zeros(num_tokens, *known[0].shape[1:])
    is_given = torch.zeros(num_tokens, dtype=torch.bool)
    start = 0
    for segment in segments:
        if segment.experts is not None:
            end = start + len(segment.experts)
            given[start:end], is_given[start:end] = segment.experts, True
        start += len(segment.ids)
    return Routing(given, is_given)


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
