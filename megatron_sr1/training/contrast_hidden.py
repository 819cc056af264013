"""Whole distributions of two contexts side by side: what each row of an optimizer step needs of the other context.

A distribution is kept as the hidden state that it is made of, H numbers for a token in place of the vocabulary's. Where
the head is, the KL is made of both (`kernels.linear_divergence`): of a row in its own context with the gradient through
its own logits, of the row under the contrast with that through its. Hidden states are there on ranks of the last stage
alone; on the others, which have no head, rows need nothing.

Shape legend: R scored tokens of a row, K of them, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_sr1.training.contrasts import ContrastRows
from megatron_sr1.types import MicroBatch, OtherContext


def others_of_own(
    contrast: ContrastRows,
    hidden: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    own: Sequence[MicroBatch],
    number: int,
) -> list[OtherContext | None]:
    """The contrast, for each row in its own context; None: this rank has no head.

    Args:
        hidden: [R, H] of each of the contrast's rows.
        wanted: [R] bool of each row in its own context: tokens that the contrast has, and whose KL is wanted.
        own: all rows of the `number` responses of the replica.
    """
    # nothing of a size without any row
    return _others(hidden, wanted, lambda known: contrast.onto_own(known, own, number)[0], is_own=False)


def others_of_contrast(
    contrast: ContrastRows,
    hidden: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    own: Sequence[MicroBatch],
    number: int,
) -> list[OtherContext | None]:
    """Their own context, for each row under the contrast; None: this rank has no head.

    Args:
        hidden: [R, H] of each row in its own context.
        wanted: [R] bool of each of the contrast's rows: whose KL is wanted.
        own: all rows of the `number` responses of the replica.
    """
    return _others(hidden, wanted, lambda known: contrast.from_own(known, own, number), is_own=True)


def _others(
    hidden: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    placed: Callable[[list[Tensor]], list[Tensor]],
    *,
    is_own: bool,
) -> list[OtherContext | None]:
    """One for each row of `wanted`; `placed` brings hidden states [H, R] to these rows."""
    known = [each.t() for each in hidden if each is not None]
    if len(known) < len(hidden):
        return [None] * len(wanted)
    return [_other(values, each, is_own=is_own) for values, each in zip(placed(known), wanted, strict=True)]


def _other(values: Tensor, wanted: Tensor, *, is_own: bool) -> OtherContext:
    rows = torch.nonzero(wanted).squeeze(1)
    hidden = values[..., rows].t().contiguous() if values.ndim == 2 else values.new_zeros(len(rows), 0)
    return OtherContext(rows, hidden, is_own)
