"""What the back ends of linear_logprob share: the data of a tile of logits, and matrix products that add in float32.

Shapes: T tokens, H hidden size, V columns of this rank's shard without padding, C columns and R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that this rank holds: ids [start, start + columns)."""

    start: int
    columns: int  # padding not counted
    group: ProcessGroup | None  # the ranks that share the vocabulary
    bias: Tensor | None = None  # [V_local] added to the logits, in the accumulation dtype; no gradient flows to it

    def bias_of(self, left: int, right: int) -> Tensor | None:
        return None if self.bias is None else self.bias[left:right]


@dataclass(frozen=True)
class Rows:
    """What a tile needs to know about its tokens, besides their hidden states."""

    targets: Tensor  # [T] id minus the shard's start; outside the shard it lies outside [0, V)
    inverse_temperature: Tensor | None  # [T], maybe one number expanded; None: 1

    def select(self, index: Tensor) -> Rows:
        return Rows(self.targets[index], None if self.inverse_temperature is None else self.inverse_temperature[index])


@dataclass(frozen=True)
class RowGradients:
    """Coefficients, all [T], of d_logits = at_target * 1[j = target] - p * (of_p + of_p_log_p * log p)."""

    at_target: Tensor
    of_p: Tensor
    of_p_log_p: Tensor | None  # None: no gradient of the entropy

    def part(self, first: int, last: int) -> RowGradients:
        of_p_log_p = None if self.of_p_log_p is None else self.of_p_log_p[first:last]
        return RowGradients(self.at_target[first:last], self.of_p[first:last], of_p_log_p)

    def select(self, index: Tensor) -> RowGradients:
        of_p_log_p = None if self.of_p_log_p is None else self.of_p_log_p[index]
        return RowGradients(self.at_target[index], self.of_p[index], of_p_log_p)


@dataclass(frozen=True)
class Tile:
    """The rows and columns of one tile of logits z = (round(hidden @ weight.T) + bias) * inverse_temperature."""

    targets: Tensor  # [R] column of the target; where another tile has it, outside [0, C)
    inverse_temperature: Tensor | None  # [R]
    bias: Tensor | None  # [C]
    rounded: bool  # products are rounded to bfloat16


class TileOperations(Protocol):
    """What a back end does with one tile; the driver is the same for all."""

    def make(self, hidden: Tensor, weight: Tensor, tile: Tile) -> Tensor:
        """The tile [R, C] from hidden [R, H] and weight [C, H], in whatever form the other two read it."""
        ...

    def fold(self, state: Tensor, z: Tensor, tile: Tile, entropy: bool) -> None:
        """Adds a tile to the state [4, R]; may overwrite neither."""
        ...

    def gradient(
        self, z: Tensor, logsumexp: Tensor, tile: Tile, gradients: RowGradients, dtype: torch.dtype, overwrite: bool
    ) -> Tensor:
        """Gradient [R, C] of the products, in `dtype`; may overwrite z if allowed to."""
        ...


Statistics = Callable[[Tensor, Tensor, Rows, VocabShard, bool, bool], Tensor]


@dataclass(frozen=True)
class Backend:
    """How tiles are computed, and, where it has one, a way to the statistics [4, T] of all tiles at once:
    `statistics(hidden, weight, rows, shard, entropy, rounded)`."""

    tiles: TileOperations
    statistics: Statistics | None = None


def empty_state(num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[4, T] before any tile: max, sum of exp(z - max), z of the target, sum of exp(z - max) * (z - max)."""
    state = torch.zeros(4, num_tokens, dtype=dtype, device=device)
    # The smallest number stands for "nothing yet": unlike -inf it can be subtracted from itself.
    state[0].fill_(torch.finfo(dtype).min)
    state[2].fill_(torch.finfo(dtype).min)
    return state


def dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(accumulation dtype, dtype of the factors of a product). Rounding logits to bfloat16 costs up to 0.05 nats a
    token, so products of low-precision factors have float32 results; the CPU has no such product, so it casts."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    return accumulate, hidden.dtype if hidden.is_cuda else accumulate


def raw_product(hidden: Tensor, weight: Tensor, rounded: bool) -> Tensor:
    """hidden [R, H] @ weight.T [H, C] in the accumulation dtype or, rounded, in bfloat16."""
    accumulate, operand = dtypes(hidden)
    if rounded and operand == torch.bfloat16:
        return hidden @ weight.t()
    z = product(hidden.to(operand), weight.t(), accumulate)
    return z.bfloat16() if rounded else z


def product(left: Tensor, right: Tensor, accumulate: torch.dtype) -> Tensor:
    """left @ right, summed and returned in the accumulation dtype."""
    return left @ right if left.dtype == accumulate else torch.mm(left, right, out_dtype=accumulate)


def add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right: one matrix product that reads and writes `into`, no temporary of its size."""
    if left.dtype == into.dtype:
        into.addmm_(left, right)
    else:
        torch.addmm(into, left, right, out_dtype=into.dtype, out=into)


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive pieces of `size` numbers, the last one maybe shorter."""
    for start in range(0, total, size):
        yield start, min(start + size, total)
