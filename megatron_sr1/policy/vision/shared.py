"""Visual tokens of a micro-batch on every rank of a model replica, each patch encoded by one of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.policy.vision.assignment import SplitCosts, VisionPlan, plan_images
from megatron_sr1.policy.vision.exchange import gather_copies
from megatron_sr1.policy.vision.patches import (
    Grid,
    PatchOrder,
    VisionTower,
    full_attention_layers,
    has_windows,
    patch_order,
)
from megatron_sr1.policy.vision.rows import rank_rows
from megatron_sr1.policy.vision.tower import run_tower, tower_inputs
from megatron_sr1.types import EncodedImage, MicroBatch


class SharedVision:
    """Calls the tower for micro-batches with images; every rank of `group` calls it with the same ones, in one order.

    After backward a rank's gradients of the tower's parameters are those of the patches it encoded: they add up, over
    the tensor- and context-parallel ranks, to the gradients of the whole. The result must enter the graph of every rank
    (an index that picks no row is enough), or the ranks would wait for each other in backward.

    A frozen tower's result is kept as long as its micro-batch lives, so that all passes of a step over the same
    micro-batch objects encode once; its weights must not change meanwhile.
    """

    def __init__(
        self,
        tower: VisionTower,
        group: ProcessGroup,
        context_group: ProcessGroup,
        *,
        trained: bool,
        recompute: bool,
        costs: SplitCosts | None = None,
    ) -> None:
        """
        Args:
            tower: the transformers module.
            group: the tensor- times context-parallel ranks of this replica.
            context_group: the ranks of `group` that hold other parts of the sequence.
            trained: whether gradients reach the tower.
            recompute: run its blocks again in backward instead of keeping their activations.
            costs: of splitting an image; an H100 node's by default.
        """
        self.num_encoded_patches = 0  # by this rank, so far; recomputation not counted
        self._tower = tower
        self._group = group
        self._context_group = context_group
        self._trained = trained
        self._recompute = recompute
        self._costs = costs or SplitCosts()
        self._kept: dict[int, Tensor] = {}  # by id of a live micro-batch

    def __call__(self, batch: MicroBatch) -> Tensor:
        """[1 + L, V, H], in the tower's dtype: the visual tokens of `batch.images`, in order, and their L DeepStack
        features."""
        assert batch.images, "a micro-batch without images needs no vision tower"
        if self._trained:
            return self._encode(batch.images)
        if id(batch) not in self._kept:
            with torch.no_grad():
                self._kept[id(batch)] = self._encode(batch.images)
            weakref.finalize(batch, self._kept.pop, id(batch)).atexit = False
        return self._kept[id(batch)]

    def start(self, batches: Sequence[MicroBatch]) -> None:
        """Has the patches that this rank will encode made ahead, in the order of the micro-batches."""
        for batch in batches:
            if batch.images and id(batch) not in self._kept:
                for piece in self._plan(batch.images).parts[self._group.rank()]:
                    batch.images[piece.image].patches.start()

    def _plan(self, images: Sequence[EncodedImage]) -> VisionPlan:
        return plan_grids(self._tower, [image.grid_thw for image in images], self._group.size(), self._costs)

    def _encode(self, images: Sequence[EncodedImage]) -> Tensor:
        plan = self._plan(images)
        self.num_encoded_patches += plan.patches[self._group.rank()]
        return encode_images(self._tower, images, plan, self._group, self._context_group, recompute=self._recompute)


def plan_grids(
    tower: VisionTower, grids: Sequence[Grid], num_ranks: int, costs: SplitCosts | None = None
) -> VisionPlan:
    """`plan_images` for images of these grids in `tower`'s order of patches."""
    cuts = [patch_order(tower, grid).cuts for grid in grids]
    return plan_images(cuts, num_ranks, attention_layers=len(full_attention_layers(tower)), costs=costs)


def encode_images(
    tower: VisionTower,
    images: Sequence[EncodedImage],
    plan: VisionPlan,
    group: ProcessGroup,
    context_group: ProcessGroup,
    *,
    recompute: bool,
) -> Tensor:
    """[1 + L, V, H]: what `SharedVision` returns, by a given plan."""
    orders = [patch_order(tower, image.grid_thw) for image in images]
    rows = rank_rows(plan, group.rank(), orders, windows=has_windows(tower))
    inputs = tower_inputs(tower, images, orders, plan.parts[group.rank()], rows)
    local = run_tower(tower, inputs, group, recompute=recompute)  # [U, 1 + L, H]
    per_token = tower.spatial_merge_size**2
    sizes = tuple(patches // per_token for patches in plan.patches)
    gathered = gather_copies(local, sizes, group, context_group)  # [V, 1 + L, H], rank after rank
    return gathered[_image_order(plan, orders, per_token).to(gathered.device)].transpose(0, 1)


def _image_order(plan: VisionPlan, orders: Sequence[PatchOrder], per_token: int) -> Tensor:
    """[V] int64: for each visual token, in the order of the images, its row among those gathered."""
    first, starts = 0, []
    for order in orders:
        starts.append(first)
        first += len(order.units)
    pieces = [piece for part in plan.parts for piece in part]
    tokens = [
        starts[piece.image] + orders[piece.image].units[piece.start // per_token : piece.stop // per_token]
        for piece in pieces
    ]
    return torch.argsort(torch.cat(tokens))
