"""Gradients are added up in buckets while backward goes on, whatever each replica's rows hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.packing import pack
from megatron_sr1.policy import gradients
from megatron_sr1.processor import Processor
from megatron_sr1.types import Scoring, TokenSequence
from tests.model_zoo import create_family
from tests.policy_cases import (
    BUDGET,
    LEARNING_RATE,
    STEP_TOLERANCE,
    TOLERANCE,
    MeanLoss,
    built,
    make_sequences,
    processor_of,
)
from tests.ranks import run_ranks

BUCKET = "layout.gradient_bucket=20000"  # of models of some 200,000 parameters
FAMILIES = ("qwen2_5_vl_tied", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
SEEDS = {"qwen3_5_moe": 2}  # of weights; with others a router may come to a tie, and another rounding is another expert
IN_ALL = ("qwen2_5_vl_tied", "qwen3_vl_moe")  # layouts; the others in the first of two ranks
LAYOUTS: dict[int, tuple[tuple[str, ...], ...]] = {
    2: ((), ("recompute.mode=full", "recompute.vision=true"), ("layout.distributed_optimizer=false",)),
    4: (("layout.tensor=2", "layout.sequence_parallel=true"), ("layout.pipeline=2",), ("layout.context=2",)),
}


def _steps(processor: Processor, num_replicas: int) -> list[list[list[TokenSequence]]]:
    """For every step the sequences of each replica: images on one alone, on both, on none, on the other alone."""
    sequences = make_sequences(processor)
    images = [sequence for sequence in sequences if sequence.images]
    text = [sequence for sequence in sequences if not sequence.images]
    halves = [images[:2], images[2:]]
    steps = [[images, text], halves, [text[:1], text[1:]], [text, images], halves]
    return steps if num_replicas == 2 else [[first + second] for first, second in steps]


def _train(folder: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    processor = processor_of(folder)
    norms, early = [], []
    with built(folder, overrides) as (policy, config):
        replica = policy.groups.data
        for step in _steps(processor, replica.size()):
            mine = step[replica.rank()]
            batches = pack(
                mine,
                max_tokens=BUDGET,
                row_multiple=config.row_multiple,
                sequence_multiple=config.sequence_multiple,
                image_token_id=processor.image_token_id,
                merge_size=processor.merge_size,
            )
            num_tokens = sum(len(sequence.response_ids) for part in step for sequence in part)
            with _recording(policy) as sent:
                norms.append(policy.train_step(batches, MeanLoss(num_tokens), Scoring()).grad_norm)
            early.append(sent)
        groups = [group for chunk in policy.model for group in chunk.bucket_groups]
        vision = [bool(group.params & set(gradients._vision(policy.model[0]))) for group in groups]
        weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    return {"norms": norms, "weights": weights, "early": early, "vision": vision}


class _recording:
    """Which buckets were on their way when backward ended."""

    def __init__(self, policy: Any) -> None:
        self.config = policy.chunks[0].config
        self.groups = [group for chunk in policy.model for group in chunk.bucket_groups]
        self.finalize = self.config.finalize_model_grads_func
        self.sent: list[bool] = []

    def __enter__(self) -> list[bool]:
        def finalize(*arguments: Any, **options: Any) -> None:
            self.sent += [group.grad_reduce_handle is not None for group in self.groups]
            self.finalize(*arguments, **options)

        self.config.finalize_model_grads_func = finalize
        return self.sent

    def __exit__(self, *_: object) -> None:
        self.config.finalize_model_grads_func = self.finalize


def _walk(rank: int, num_ranks: int, folder: str) -> None:
    for family in FAMILIES:
        place = f"{folder}/{family}"
        if num_ranks == 1:
            torch.save(_train(place, ("layout.gradient_bucket=1000000000",)), f"{place}.pt")
            continue
        expected = torch.load(f"{place}.pt", weights_only=False)
        for layout in LAYOUTS[num_ranks] if family in IN_ALL else LAYOUTS[num_ranks][:1] * (num_ranks == 2):
            name = f"{family} {layout}"
            found = _train(place, (BUCKET, *layout))
            assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE), name
            for key, weight in found["weights"].items():
                gap = (weight - expected["weights"][key]).abs().max().item()
                assert gap < STEP_TOLERANCE * LEARNING_RATE * len(found["norms"]), f"{name}: {key} differs by {gap}"
            vision, early = found["vision"], found["early"]
            if "layout.pipeline=2" not in layout:
                assert len(vision) > 3 and any(vision) and not all(vision), (name, vision)
                assert not any(early[0]), name  # the first step counts
                assert all(step == [not late for late in vision] for step in early[1:]), (name, vision, early)


def test_replicas_with_and_without_images_add_up_their_gradients(tmp_path: Path) -> None:
    for family in FAMILIES:
        create_family(tmp_path / family, family, seed=SEEDS.get(family, 0))
    for num_ranks in (1, 2, 4):
        run_ranks(num_ranks, _walk, str(tmp_path))
