"""One engine of two ranks: the same tokens as one of one rank, and what happens when it fails. One launch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sr1.types import PromptShare
from tests.ranks import run_ranks
from tests.rollout_cases import (
    MAX_MODEL_TOKENS,
    MAX_RESPONSE,
    TOLERANCE,
    changed_weight,
    describing_processor,
    finishing_engine,
    make_model,
    prompts,
    reference_differences,
    sampling,
    tracks,
)

NUM_RANKS = 2
FAULT_WAIT = 3.0  # seconds


def collect(rank: int, num_ranks: int, folder: str) -> None:
    from megatron_sr1.platform import GroupRanks, TeamRanks
    from megatron_sr1.rollout import EngineLimits, Limits, Planner, TwoPassGenerator
    from megatron_sr1.rollout.request import EngineFault

    model_dir = f"{folder}/model"
    limits = EngineLimits(MAX_MODEL_TOKENS, 64, kv_cache_gib=0.25, max_images=2, seed=0, tensor_parallel=num_ranks)
    engine = finishing_engine()(model_dir, limits)
    engine.fault_wait_seconds = FAULT_WAIT
    processor = describing_processor(model_dir)
    weights = load_file(f"{model_dir}/model.safetensors")
    changed = {name: changed_weight(name, tensor) for name, tensor in weights.items()}

    def generator(streamed: bool = True) -> Any:
        planner = Planner(processor, Limits(MAX_RESPONSE, MAX_MODEL_TOKENS, 100))
        engines = TeamRanks(GroupRanks(), num_ranks)
        return TwoPassGenerator(engine, planner, engines=engines, streamed=streamed, weights=changed.items)

    batch, greedy = prompts(8), sampling(temperature=0.0, num_samples=1)
    facts: dict[str, Any] = {
        "greedy": generator().generate(PromptShare.whole(batch), greedy, 0),
        "media_ids": processor.media_ids,
    }
    facts["sampled"] = generator().generate(PromptShare.whole(batch), sampling(), 1)
    facts["barrier"] = generator(streamed=False).generate(PromptShare.whole(batch), sampling(), 1)
    generator().update_weights(changed.items(), version=3)
    facts["changed"] = generator().generate(PromptShare.whole(batch), greedy, 0)
    engine.steps_to_fault = 5
    facts["recovered"] = generator().generate(PromptShare.whole(batch), greedy, 0)
    torch.save(facts, f"{folder}/facts{rank}.pt")

    engine.steps_to_fault = 5 if rank == 1 else None
    started = time.monotonic()
    try:
        generator().generate(PromptShare.whole(batch), greedy, 0)
    except EngineFault as fault:
        alone = {"text": str(fault), "seconds": time.monotonic() - started}
        torch.save(alone, f"{folder}/alone{rank}.pt")
        raise  # as in a run: this rank's end frees the other


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine_ranks")
    make_model(folder / "model")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="EngineFault"):
        run_ranks(NUM_RANKS, collect, str(folder))
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"facts{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


def test_both_ranks_give_transformers_tokens(folder: Path, facts: list[dict[str, Any]]) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    assert reference_differences(folder, weights, facts[0]["greedy"], facts[0]["media_ids"]) < TOLERANCE
    assert tracks(facts[0]["greedy"]) == tracks(facts[1]["greedy"])


def test_streaming_changes_no_token(facts: list[dict[str, Any]]) -> None:
    assert tracks(facts[0]["sampled"]) == tracks(facts[1]["barrier"])
    assert len(set(map(str, tracks(facts[0]["sampled"])))) == 16, "eight prompts, two samples each"


def test_an_engine_whose_ranks_fail_together_is_refilled_and_answers_everything(facts: list[dict[str, Any]]) -> None:
    for rank_facts in facts:
        assert tracks(rank_facts["recovered"]) == tracks(facts[0]["changed"])
        assert rank_facts["recovered"][0].pairs[0].second.weight_version == 3
    assert tracks(facts[0]["changed"]) != tracks(facts[0]["greedy"])


def test_a_rank_that_fails_alone_ends_the_run_instead_of_waiting_for_the_others(folder: Path) -> None:
    alone = torch.load(folder / "alone1.pt", weights_only=False)
    assert "one rank of an engine failed alone" in alone["text"]
    assert alone["seconds"] < FAULT_WAIT + 10
