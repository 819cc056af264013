"""Router replay: a mixture's tokens go to the experts that they went to before.

Which k experts a router chooses is not continuous in its input: rounding that engine and trainer, or two passes, do
otherwise sends some tokens elsewhere, and their log-probs jump. So the choice is replayed (Ma et al. 2025, arXiv
2510.11370, "R3": that of the engine; Zheng et al. 2025, arXiv 2507.18071, section 5.3, "Routing Replay": that of the
trainer's own first pass). The weights of the chosen experts are not: they are the softmax over the present router's
logits of these experts, so the gradient reaches the router.

A choice belongs to a row and goes with it into every layer, so schedules may mix the passes over several rows, and what
is recomputed in backward is routed as it was.

Shape legend: T_part tokens of the row on this rank (context and sequence parallelism split them), M layers with
experts, E experts in each, k of them for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_sr1.platform.torch_private import with_children
from megatron_sr1.types import MicroBatch, Routing

_TopK = Callable[..., tuple[Tensor, Tensor]]


def id_dtype(num_experts: int) -> torch.dtype:
    """The narrowest that holds the ids of so many experts."""
    return torch.uint8 if num_experts <= 256 else torch.int16


@dataclass(frozen=True)
class RankRouting:
    """This rank's part of a row's routing, in the layers of one chunk."""

    routing: Routing
    given: Tensor | None  # [T_part, m, k] of the chunk's m layers with experts
    is_given: Tensor | None  # [T_part] bool
    scored: Tensor  # [T_part] int64: how many scored tokens each token predicts
    places: Mapping[int, int]  # of the chunk's layers that have experts, by number: among the M; increasing

    @classmethod
    def of(cls, batch: MicroBatch, part: Tensor, places: Mapping[int, int]) -> RankRouting | None:
        """None where the row has none, or the chunk no layer with experts.

        Args:
            part: [T_part] int64, which tokens of the row the layers have.
        """
        routing = batch.routing
        if routing is None or not places:
            return None
        scored = torch.bincount(batch.loss_rows, minlength=len(batch.input_ids))[part]
        if routing.given is None or routing.is_given is None:
            return cls(routing, None, None, scored, places)
        first, last = min(places.values()), max(places.values())
        chosen = part.cpu()
        given = routing.given[chosen, first : last + 1].to(part.device)
        return cls(routing, given, routing.is_given[chosen].to(part.device), scored, places)


class _Choice:
    """The routing of one layer, where Megatron-Core's router asks its `router_replay`."""

    def __init__(self, row: RankRouting, place: int) -> None:
        self._row = row
        self._place = place

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: _TopK = torch.topk,
    ) -> tuple[Tensor, Tensor]:
        """Scores [T_part, k] and ids [T_part, k] int64 of the experts, out of scores [T_part, E]."""
        _, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        chosen = self._followed(own, scores.shape[-1])
        agreed = (own[:, :, None] == chosen[:, None, :]).any(2).sum(1)  # [T_part]
        self._row.routing.agreed[self._place] = (agreed * self._row.scored).sum()
        return scores.gather(1, chosen), chosen

    def _followed(self, own: Tensor, num_experts: int) -> Tensor:
        """[T_part, k]

        Args:
            own: what the router would choose now.
        """
        row, kept = self._row, self._row.routing.kept
        if row.given is not None and row.is_given is not None:
            given = row.given[:, self._place - min(row.places.values())].long()
            return torch.where(row.is_given[:, None], given, own)
        if self._place not in kept:
            kept[self._place] = own.to(id_dtype(num_experts))
            return own
        return kept[self._place].long()


@contextmanager
def routed(layer: TransformerLayer, row: RankRouting | None) -> Iterator[None]:
    """Has a layer's router follow the row while the layer is run, and whenever what it has run is recomputed."""
    if row is None or layer.layer_number not in row.places:
        yield
        return
    # A router that this call alone has: an expert part that is made again in backward asks the router it was run with,
    # when the layer may have been run for other rows since.
    experts: Any = layer.mlp
    router: Any = with_children(experts.router)
    router.router_replay = _Choice(row, row.places[layer.layer_number])
    layer.mlp = with_children(experts, router=router)
    try:
        yield
    finally:
        layer.mlp = experts
