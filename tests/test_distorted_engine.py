"""Noisy images on the real engine: what it draws is what transformers says of those pixels, beside clean siblings that
share every id of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.types import Distorted, PromptShare, RolloutGroup
from tests.ranks import run_ranks
from tests.rollout_cases import (
    MAX_MODEL_TOKENS,
    MAX_RESPONSE,
    PIXELS,
    TOLERANCE,
    make_model,
    prompts,
    sampling,
)

MIXED = sampling(num_samples=4, later=(), distorted=Distorted(2, 0.5))


def collect(rank: int, num_ranks: int, folder: str) -> None:
    from megatron_sr1.processor import Processor
    from megatron_sr1.rollout import Engine, EngineLimits, Limits, Planner, TwoPassGenerator

    limits = EngineLimits(
        MAX_MODEL_TOKENS, max_running_requests=64, kv_cache_gib=0.25, max_images=2, seed=0, pixels=PIXELS
    )
    processor = Processor.from_pretrained(f"{folder}/model", pixels=PIXELS)
    planner = Planner(processor, Limits(MAX_RESPONSE, MAX_MODEL_TOKENS, 100))
    made = TwoPassGenerator(Engine(f"{folder}/model", limits), planner)
    # one call after the other on one engine: caches hold prefixes and embeddings of both kinds by then
    groups = [made.generate(PromptShare.whole(prompts(4)), MIXED, step) for step in (3, 4, 3)]
    torch.save(groups, f"{folder}/groups.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distorted")
    make_model(folder / "model")
    run_ranks(1, collect, str(folder))
    return folder


@pytest.fixture(scope="module")
def groups(folder: Path) -> list[list[RolloutGroup]]:
    return torch.load(folder / "groups.pt", weights_only=False)


class Scores:
    """Log-probs by transformers of what the engine has drawn."""

    def __init__(self, folder: Path) -> None:
        from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
        from megatron_sr1.processor import Processor

        define_missing_torchvision_ops()
        from transformers import Qwen2_5_VLForConditionalGeneration

        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
        self.processor = Processor.from_pretrained(str(folder / "model"), pixels=PIXELS)

    def gap(self, rollout: Any, images: list[Any]) -> float:
        """The largest to the engine's."""
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        vision: dict[str, Any] = {"mm_token_type_ids": (ids == self.processor.image_token_id).int()}
        if images:
            vision["pixel_values"] = torch.cat([image.pixel_values for image in images])
            vision["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        with torch.no_grad():
            logits = self._model(input_ids=ids, **vision).logits[0, len(rollout.prompt_ids) - 1 : -1]
        logits[:, list(self.processor.media_ids)] -= 100.0
        found = logits.log_softmax(-1).gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        return (found - torch.tensor(rollout.generator_logprobs)).abs().max().item()


def test_the_engine_looks_at_noisy_images_and_at_clean_ones_beside_them(
    folder: Path, groups: list[list[RolloutGroup]]
) -> None:
    from megatron_sr1.rollout.distortion import Distortion
    from megatron_sr1.rollout.plan import Limits, Planner

    scores = Scores(folder)
    planner = Planner(scores.processor, Limits(MAX_RESPONSE, MAX_MODEL_TOKENS, 100))
    seen, other = [], []
    for step, made in zip((3, 4, 3), groups, strict=True):
        distortion = Distortion(scores.processor, MIXED, step)
        for group in made:
            plan = planner.first(group.prompt, "see_think" if group.prompt.images else "cot")
            clean = [scores.processor.encode_image(image) for image in plan.images]
            noise = distortion.take(plan, 0)
            assert [pair.distorted for pair in group.pairs] == [False, False] + [bool(plan.images)] * 2
            for pair in group.pairs:
                seen.append(scores.gap(pair.first, noise if pair.distorted else clean))
                if plan.images:
                    other.append(scores.gap(pair.first, clean if pair.distorted else noise))
    assert max(seen) < TOLERANCE, "with the pixels that each was given"
    assert sorted(other)[len(other) // 2] > 5 * TOLERANCE, "and the others are told apart"


def test_a_step_that_is_drawn_again_is_the_same(groups: list[list[RolloutGroup]]) -> None:
    first, second, again = [[pair for group in made for pair in group.pairs] for made in groups]
    assert [pair.first.response_ids for pair in first] == [pair.first.response_ids for pair in again]
    assert [pair.first.response_ids for pair in first] != [pair.first.response_ids for pair in second]
    assert all(len({pair.first.prompt_ids for pair in group.pairs}) == 1 for group in groups[0])
