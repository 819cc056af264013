"""The shared vision tower against transformers' own forward in one process; each launch runs many checks.

What imports Megatron-Core's rooms runs in ranks of its own, so that the CPU shim never reaches the test process.
"""

from __future__ import annotations

import gc
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sr1.ahead import Later
from megatron_sr1.types import EncodedImage, MicroBatch, Normalisation
from tests.ranks import run_ranks

TOLERANCE = 1e-6  # relative, fp32, of the visual tokens
GRADIENT_TOLERANCE = 2e-6  # relative, fp32, of each parameter's gradient
TINY = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 40,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
GRIDS = {  # rows and columns of patches; a window is 4 x 4
    "one image": [(12, 20)],
    "two windows": [(4, 6)],  # on four ranks: two share an image, the others hold nothing
    "two tokens": [(2, 4)],
    "three images": [(8, 8), (6, 10), (4, 14)],
    "very uneven": [(2, 2), (30, 26), (2, 6), (4, 4)],
    "odd sizes": [(6, 14), (10, 2), (2, 30), (14, 18)],
    "many": [(8, 8), (4, 8), (8, 6), (4, 4), (6, 6), (8, 4), (2, 12), (10, 6)],
}


def _tower(name: str) -> torch.nn.Module:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
    from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as qwen3_moe

    torch.manual_seed(0)
    tables = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
    if name == "Qwen2.5-VL":
        config = qwen2_5.Qwen2_5_VLVisionConfig(**TINY, window_size=16, fullatt_block_indexes=[1])
        kind = qwen2_5.Qwen2_5_VisionTransformerPretrainedModel
    elif name == "Qwen3-VL":
        config, kind = qwen3.Qwen3VLVisionConfig(**TINY, **tables), qwen3.Qwen3VLVisionModel
    else:
        config, kind = qwen3_moe.Qwen3VLMoeVisionConfig(**TINY, **tables), qwen3_moe.Qwen3VLMoeVisionModel
    tower = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    with torch.no_grad():  # biases and norms start at 0 and 1, where errors in them would not show
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tower


PLAIN = Normalisation(1.0, (0.0,), (1.0,))


class _Pictures:
    """A micro-batch of random images, and how many of them this rank has made patches of."""

    def __init__(self, grids: list[tuple[int, int]], seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = [torch.randn(h * w, 3 * 2 * 4 * 4, generator=generator) for h, w in grids]
        self.grids = [(1, h, w) for h, w in grids]
        self.num_made = 0

    def batch(self) -> MicroBatch:
        def make(index: int) -> Tensor:
            self.num_made += 1
            return self.pixels[index]

        images = tuple(EncodedImage(grid, Later(lambda i=i: make(i)), PLAIN) for i, grid in enumerate(self.grids))
        empty = torch.zeros(0, dtype=torch.int64)
        return MicroBatch(empty, empty, empty, 0, (), empty, images, empty, empty, empty, empty)

    def expected(self, tower: Any) -> Tensor:
        """[1 + L, V, H] of transformers' forward."""
        output = tower(torch.cat(self.pixels), grid_thw=torch.tensor(self.grids))
        features = [] if "deepstack_features" not in output else output.deepstack_features
        return torch.stack([output.pooler_output, *features])


def _gap(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def _loss(visual: Tensor, share: int, num_shares: int) -> Tensor:
    """Of the tokens that a context-parallel rank holds; the shares add up to the loss of all."""
    weights = torch.randn(visual.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.arange(visual.shape[1]) % num_shares == share
    return (visual.square() * weights)[:, mine].sum()


def _reference(tower: torch.nn.Module, pictures: _Pictures) -> tuple[Tensor, dict[str, Tensor]]:
    tower.zero_grad()
    expected = pictures.expected(tower)
    _loss(expected, 0, 1).backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    tower.zero_grad()
    return expected.detach(), gradients


def _check_gradients(tower: torch.nn.Module, expected: dict[str, Tensor], where: str) -> None:
    """The ranks' gradients add up to those of the plain module. A parameter that a rank did not use counts as 0."""
    scale = max(gradient.norm() for gradient in expected.values())
    for name, parameter in tower.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(found)
        # a key's bias moves all scores of a query alike: its gradient is 0 but for rounding
        gap = (found - expected[name]).norm() / max(expected[name].norm(), 1e-3 * scale)
        assert gap < GRADIENT_TOLERANCE, f"{where}: {name} differs by {gap}"


def _context_group(rank: int, num_ranks: int, context: int) -> ProcessGroup:
    """Of TP x CP ranks, tensor-parallel neighbours first, as Megatron-Core orders them."""
    tensor = num_ranks // context
    groups = [
        torch.distributed.new_group([offset + tensor * index for index in range(context)]) for offset in range(tensor)
    ]
    return groups[rank % tensor]


def _check_layouts(rank: int, num_ranks: int, contexts: list[int]) -> None:
    from megatron_sr1.platform import start_platform

    start_platform()
    from megatron_sr1.policy.vision import SharedVision, SplitCosts, plan_grids

    world = torch.distributed.group.WORLD
    ways = {"whole": SplitCosts(per_collective=math.inf), "split": SplitCosts(0.0, 0.0)}
    for name in ("Qwen2.5-VL", "Qwen3-VL"):
        tower = _tower(name)
        for context in contexts:
            context_group = _context_group(rank, num_ranks, context)
            for (kind, grids), (way, costs), recompute in itertools.product(GRIDS.items(), ways.items(), (False, True)):
                where = f"{name}, {kind}, {way}, CP{context} of {num_ranks}, recompute {recompute}"
                pictures = _Pictures(grids)
                plan = plan_grids(tower, pictures.grids, num_ranks, costs)
                assert way == "split" or not plan.shared_images
                expected, gradients = _reference(tower, pictures)
                vision = SharedVision(tower, world, context_group, trained=True, recompute=recompute, costs=costs)
                batch = pictures.batch()
                with torch.no_grad():  # the old log-probs' pass
                    assert _gap(vision(batch), expected) < TOLERANCE, where
                assert pictures.num_made == len(plan.parts[rank]), where
                found = vision(batch)
                assert vision.num_encoded_patches == 2 * plan.patches[rank], where
                assert _gap(found.detach(), expected) < TOLERANCE, where
                _loss(found, context_group.rank(), context).backward()
                _check_gradients(tower, gradients, where)
    if num_ranks > 1:
        _check_that_plans_split(num_ranks)


def _check_that_plans_split(num_ranks: int) -> None:
    """The cases above are what their names say."""
    from megatron_sr1.policy.vision import SplitCosts, plan_grids

    grids = {kind: [(1, *grid) for grid in sizes] for kind, sizes in GRIDS.items()}
    for name in ("Qwen2.5-VL", "Qwen3-VL"):
        tower, free = _tower(name), SplitCosts(0.0, 0.0)
        assert plan_grids(tower, grids["one image"], num_ranks, free).shared_images == {0}
        uneven = plan_grids(tower, grids["very uneven"], num_ranks, free)
        assert uneven.shared_images == {1}, "small images stay whole beside a large one"
        assert max(uneven.patches) <= 1.1 * sum(uneven.patches) / num_ranks
        fewer = plan_grids(tower, grids["two windows" if name == "Qwen2.5-VL" else "two tokens"], num_ranks, free)
        assert fewer.shared_images == {0} and sum(patches > 0 for patches in fewer.patches) == 2
    whole = plan_grids(tower, grids["one image"], num_ranks, SplitCosts(per_collective=math.inf))
    assert sorted(whole.patches) == [0] * (num_ranks - 1) + [240], "the other ranks hold nothing"


def _check_one_rank(rank: int, num_ranks: int) -> None:
    _check_layouts(rank, num_ranks, [1])
    _check_mixture_tower()
    _check_frozen()
    _check_recompute()
    _check_half_precision()
    _check_plans()


def _shared_vision(tower: torch.nn.Module, *, trained: bool, recompute: bool = False) -> Any:
    from megatron_sr1.policy.vision import SharedVision

    world = torch.distributed.group.WORLD
    return SharedVision(tower, world, world, trained=trained, recompute=recompute)


def _check_mixture_tower() -> None:
    tower, pictures = _tower("Qwen3-VL-MoE"), _Pictures(GRIDS["odd sizes"])
    expected, gradients = _reference(tower, pictures)
    found = _shared_vision(tower, trained=True)(pictures.batch())
    assert _gap(found.detach(), expected) < TOLERANCE
    _loss(found, 0, 1).backward()
    _check_gradients(tower, gradients, "Qwen3-VL-MoE")


def _check_frozen() -> None:
    """All passes over a micro-batch encode once; another micro-batch of the same images is encoded; none is kept."""
    tower, pictures = _tower("Qwen2.5-VL").requires_grad_(False), _Pictures(GRIDS["three images"])
    vision, batch = _shared_vision(tower, trained=False), pictures.batch()
    num_patches = sum(len(pixels) for pixels in pictures.pixels)
    with torch.no_grad():
        first = vision(batch)
    again = vision(batch)
    assert again is first and not again.requires_grad
    assert vision.num_encoded_patches == num_patches
    assert _gap(first, pictures.expected(tower)) < TOLERANCE
    other = _Pictures(GRIDS["three images"], seed=3)
    assert _gap(vision(other.batch()), other.expected(tower)) < TOLERANCE  # its micro-batch is gone at once
    assert vision.num_encoded_patches == 2 * num_patches
    assert list(vision._kept) == [id(batch)]
    del batch
    gc.collect()
    assert not vision._kept

    trained, batch = _shared_vision(_tower("Qwen2.5-VL"), trained=True), pictures.batch()
    assert trained(batch) is not trained(batch)
    assert trained.num_encoded_patches == 2 * num_patches
    with pytest.raises(AssertionError, match="without images"):
        vision(_Pictures([]).batch())


def _check_recompute() -> None:
    tower = _tower("Qwen3-VL")
    calls = []
    for block in tower.blocks:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for recompute, runs in ((False, 1), (True, 2)):
        calls.clear()
        vision = _shared_vision(tower, trained=True, recompute=recompute)
        _loss(vision(_Pictures(GRIDS["odd sizes"]).batch()), 0, 1).backward()
        assert len(calls) == runs * len(tower.blocks)


def _check_half_precision() -> None:
    for name in ("Qwen2.5-VL", "Qwen3-VL"):
        tower, pictures = _tower(name), _Pictures(GRIDS["odd sizes"])
        exact = pictures.expected(tower)
        tower = tower.bfloat16()
        found = _shared_vision(tower, trained=True)(pictures.batch())
        assert found.dtype == torch.bfloat16
        theirs = pictures.expected(tower)
        assert _gap(found.float(), exact) < 1.2 * _gap(theirs.float(), exact), "no less exact than transformers"


def _check_plans() -> None:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from megatron_sr1.policy.vision import SplitCosts, VisionPlan, plan_images

    steps = st.lists(st.integers(1, 16), min_size=1, max_size=12)  # patches between two places to cut
    images = st.lists(steps.map(lambda steps: (0, *itertools.accumulate(steps))), min_size=1, max_size=6)

    def check_cover(plan: VisionPlan, cuts: list[tuple[int, ...]]) -> None:
        """Every patch once, cut where it may be; shared images in the order of the ranks, before whole ones."""
        for image, places in enumerate(cuts):
            pieces = [piece for part in plan.parts for piece in part if piece.image == image]
            assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])] and pieces[-1].stop == places[-1]
            assert all(p.start < p.stop and p.start in places and p.stop in places for p in pieces)
            assert (len(pieces) > 1) == (image in plan.shared_images)
        for part, num_shared in zip(plan.parts, plan.shared_patches, strict=True):
            shared = [p for p in part if p.image in plan.shared_images]
            assert list(part[: len(shared)]) == shared and sum(map(len, shared)) == num_shared
        order = [p for part in plan.parts for p in part if p.image in plan.shared_images]
        assert order == sorted(order)

    @settings(max_examples=300, deadline=None)
    @given(images, st.integers(1, 3))
    def check_whole(cuts: list[tuple[int, ...]], ranks: int) -> None:
        plan = plan_images(cuts, ranks, attention_layers=1, costs=SplitCosts(per_collective=math.inf))
        check_cover(plan, cuts)
        assert not plan.shared_images
        choices = itertools.product(range(ranks), repeat=len(cuts))
        best = min(
            max(sum(c[-1] for c, r in zip(cuts, choice, strict=True) if r == m) for m in range(ranks))
            for choice in choices
        )
        assert max(plan.patches) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9

    @settings(max_examples=300, deadline=None)
    @given(images, st.integers(1, 9))
    def check_split(cuts: list[tuple[int, ...]], ranks: int) -> None:
        plan = plan_images(cuts, ranks, attention_layers=1, costs=SplitCosts(0.0, 0.0))
        check_cover(plan, cuts)
        widest = max(b - a for places in cuts for a, b in itertools.pairwise(places))
        assert max(plan.patches) <= sum(plan.patches) / ranks + widest

    @settings(max_examples=300, deadline=None)
    @given(images, st.integers(1, 9), st.floats(0, 20), st.floats(0, 0.5), st.integers(1, 4))
    def check_costs(cuts: list[tuple[int, ...]], ranks: int, start: float, each: float, layers: int) -> None:
        costs = SplitCosts(start, each)
        plan = plan_images(cuts, ranks, attention_layers=layers, costs=costs)
        check_cover(plan, cuts)
        whole = plan_images(cuts, ranks, attention_layers=layers, costs=SplitCosts(per_collective=math.inf))
        assert costs.of(plan, layers) <= costs.of(whole, layers)

    check_whole()
    check_split()
    check_costs()
    # by hand: 40 is split; 12 and 8 stay whole; level (40 + 12 + 8) / 3 = 20
    plan = plan_images([range(0, 41, 4), (0, 12), (0, 8)], 3, attention_layers=1, costs=SplitCosts(0.0, 0.0))
    assert plan.patches == (20, 20, 20) and plan.shared_images == {0}
    assert [(p.image, p.start, p.stop) for part in plan.parts for p in part] == [
        (0, 0, 8), (1, 0, 12), (0, 8, 20), (2, 0, 8), (0, 20, 40)
    ]  # fmt: skip
    # 10 patches saved, 2 layers of exchange: worth it below 5 a layer
    for cost, shared in ((4.9, {0}), (5.1, set())):
        dear = SplitCosts(per_collective=cost, per_patch=0.0)
        assert plan_images([range(0, 21, 2)], 2, attention_layers=2, costs=dear).shared_images == shared


def test_one_rank_and_plans() -> None:
    run_ranks(1, _check_one_rank)


def test_two_ranks() -> None:
    run_ranks(2, _check_layouts, [1, 2])


def test_four_ranks() -> None:
    run_ranks(4, _check_layouts, [2])
