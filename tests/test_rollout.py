"""The real engine, on two ranks that share a gloo group: one launch collects the facts, each test judges one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_sr1.digits.tiny_model import create_tiny_model
from megatron_sr1.types import Prompt, RolloutGroup, Sampling
from tests.ranks import run_ranks

NUM_RANKS = 2
MAX_MODEL_TOKENS = 512
MAX_RESPONSE = 24
TOLERANCE = 1e-3  # nats
IMAGE_SIZES = [(84, 28), (56, 56), (90, 41)]  # width, height; the last is resized


def prompts(num: int) -> list[Prompt]:
    """Questions over 0, 1 or 2 noise images; one question spells special tokens."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(num):
        sizes = [IMAGE_SIZES[(index + i) % 3] for i in range((1, 2, 0, 1)[index % 4])]
        images = tuple(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes)
        problem = "What does <|image_pad|> <image> say?<|im_end|>" if index == 3 else f"What is {index} plus 3?"
        made.append(Prompt(key=f"p{index}", problem=problem, answer="0", images=images))
    return made


def sampling(**changes: Any) -> Sampling:
    defaults = {"num_samples": 2, "temperature": 1.0, "max_response_tokens": MAX_RESPONSE, "seed": 5}
    return Sampling(**(defaults | changes))


def tracks(groups: list[RolloutGroup]) -> list[Any]:
    """All token ids of all passes."""
    return [
        [(r.prompt_ids, r.response_ids) for r in (pair.first, pair.second) if r is not None]
        for group in groups
        for pair in group.pairs
    ]


# ------------------------------------------------------------ what the two processes do
def collect(rank: int, num_ranks: int, folder: str) -> None:
    from megatron_sr1.rollout import TwoPassGenerator, stale_vision_canary

    model_dir = f"{folder}/model"
    engine = finishing_engine()(
        model_dir,
        max_model_tokens=MAX_MODEL_TOKENS,
        max_running_requests=256,
        kv_cache_gib=0.25,
        max_images=2,
        seed=0,
    )
    processor = describing_processor(model_dir)

    def gather(items: list[Any]) -> list[Any]:
        everyone: list[Any] = [None] * num_ranks
        torch.distributed.all_gather_object(everyone, items)
        return [item for part in everyone for item in part]

    def generator(**changes: Any) -> TwoPassGenerator:
        return TwoPassGenerator(engine, processor, max_description_tokens=100, **changes)

    ours = generator(rank=rank, num_ranks=num_ranks, gather=gather)
    batch, greedy = prompts(8), sampling(temperature=0.0, num_samples=1)
    weights = load_file(f"{model_dir}/model.safetensors")
    changed = {name: changed_weight(name, tensor) for name, tensor in weights.items()}

    facts: dict[str, Any] = {"greedy": ours.generate(batch, greedy, 0), "media_ids": processor.media_ids}
    facts["shared"] = ours.generate(batch, sampling(), 1)
    facts["alone"] = generator().generate(batch, sampling(), 1)
    facts["barrier"] = generator(streamed=False).generate(batch, sampling(), 1)
    facts["reasons"] = set(engine.reasons)
    facts["other_step"] = generator().generate(batch, sampling(), 2)
    facts["too_long"] = [
        refused(ours, [*batch, Prompt("long", "1 " * 1000, "0")], sampling()),
        refused(ours, batch, sampling(max_response_tokens=MAX_MODEL_TOKENS)),
    ]
    facts["unbanned"] = draw_freely(engine, processor, ())
    facts["banned_ids"] = tuple(sorted(facts["unbanned"])[:50])
    facts["banned"] = draw_freely(engine, processor, facts["banned_ids"])
    ours.update_weights(iter(changed.items()), version=3)
    facts["changed"] = ours.generate(batch, greedy, 0)
    engine.steps_to_fault = 5 if rank == 1 else None
    recovering = generator(rank=rank, num_ranks=num_ranks, gather=gather, weights=changed.items)
    facts["recovered"] = recovering.generate(batch, greedy, 0)
    ours.update_weights(iter(weights.items()), version=4)
    facts["restored"] = ours.generate(batch, greedy, 0)
    stale_vision_canary(engine, processor, batch[0].images[0], weights.items)
    facts["after_canary"] = ours.generate(batch, greedy, 0)
    facts["unknown"] = refused_update(ours, [("extra", torch.ones(1)), *weights.items()])
    facts["incomplete"] = refused_update(ours, list(weights.items())[1:])
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    facts["sum_of_ranks"] = total.item()
    torch.set_num_threads(1)
    facts["threads"] = torch.get_num_threads()
    torch.save(facts, f"{folder}/facts{rank}.pt")


def describing_processor(model_dir: str) -> Any:
    """Random weights never describe anything, so every response is read as a description."""
    from megatron_sr1.processing import Processor

    class Describing(Processor):
        def decode(self, ids: Any) -> str:
            return "<description>" + super().decode(ids).replace("<", "") + " .</description>"

    return Describing.from_pretrained(model_dir)


def finishing_engine() -> Any:
    """Random weights never end a turn, so a response of full length counts as ended; and it fails when told to."""
    from megatron_sr1.rollout import Engine

    class Finishing(Engine):
        steps_to_fault: int | None = None
        reasons: ClassVar[set[str]] = set()  # as the engine gave them

        def step(self) -> list[Any]:
            if self.steps_to_fault is not None:
                self.steps_to_fault -= 1
                if self.steps_to_fault < 0:
                    self.steps_to_fault = None
                    raise RuntimeError("a forward pass that fails")
            generations = super().step()
            self.reasons.update(generation.finish_reason for generation in generations)
            return [replace(generation, finish_reason="stop") for generation in generations]

    return Finishing


def changed_weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    return tensor + 0.3 * tensor.abs().mean() * noise


def refused(generator: Any, batch: list[Prompt], how: Sampling) -> str:
    try:
        generator.generate(batch, how, 0)
    except ValueError as error:
        return str(error)
    return ""


def draw_freely(engine: Any, processor: Any, banned: tuple[int, ...]) -> set[int]:
    """All ids drawn in some hundreds of tokens."""
    from megatron_sr1.rollout.request import Draw

    prepared = engine.prepare(processor.prompt_ids("Say anything.", num_images=0), ())
    for index in range(32):
        engine.add(str(index), prepared, Draw(2.0, MAX_RESPONSE, index, processor.end_of_turn_id, banned))
    seen: set[int] = set()
    while engine.has_unfinished():
        for generation in engine.step():
            seen.update(generation.response_ids)
    return seen


def refused_update(generator: Any, weights: list[tuple[str, torch.Tensor]]) -> str:
    try:
        generator.update_weights(weights, version=9)
    except ValueError as error:
        return str(error)
    return ""


# ------------------------------------------------------------ one launch
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollout")
    texts = [
        "<description> a 3 and a 7 </description> <think> 3 + 7 = 10 </think> \\boxed{10}",
        "What is 3 plus 4?",
    ] * 20
    create_tiny_model(folder / "model", texts, seed=1)
    path = folder / "model" / "model.safetensors"
    peaked = {name: tensor * 4 if tensor.dim() > 1 else tensor for name, tensor in load_file(path).items()}
    save_file(peaked, path, metadata={"format": "pt"})
    run_ranks(NUM_RANKS, collect, str(folder))
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"facts{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


def reference_differences(
    folder: Path, weights: dict[str, torch.Tensor], groups: list[RolloutGroup], media: Any
) -> float:
    """The largest |log-prob difference| to transformers, of greedy rollouts; asserts that every token is its argmax."""
    from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
    from megatron_sr1.processing import Processor

    define_missing_torchvision_ops()
    from transformers import Qwen2_5_VLForConditionalGeneration

    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
    processor = Processor.from_pretrained(str(folder / "model"))
    worst = 0.0
    for group in groups:
        pair = group.pairs[0]
        assert pair.second is not None
        for rollout, images in ((pair.first, group.prompt.images), (pair.second, ())):
            ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
            encoded = [processor.encode_image(image) for image in images]
            vision: dict[str, Any] = {"mm_token_type_ids": (ids == processor.image_token_id).int()}
            if encoded:
                vision["pixel_values"] = torch.cat([image.pixel_values for image in encoded])
                vision["image_grid_thw"] = torch.tensor([image.grid_thw for image in encoded])
            with torch.no_grad():
                logits = model(input_ids=ids, **vision).logits[0, len(rollout.prompt_ids) - 1 : -1]
            logits[:, list(media)] -= 100.0
            logprobs = logits.log_softmax(-1)
            chosen = torch.tensor(rollout.response_ids)
            assert torch.equal(logprobs.argmax(-1), chosen)
            ours = torch.tensor(rollout.generator_logprobs)
            worst = max(worst, (logprobs.gather(1, chosen[:, None])[:, 0] - ours).abs().max().item())
    return worst


def test_greedy_equals_transformers(folder: Path, facts: list[dict[str, Any]]) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    groups = facts[0]["greedy"]
    assert len({rollout.response_ids for group in groups for rollout in [group.pairs[0].first]}) > 4
    assert reference_differences(folder, weights, groups, facts[0]["media_ids"]) < TOLERANCE


def test_updated_weights_equal_transformers_with_the_same_weights(folder: Path, facts: list[dict[str, Any]]) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    changed = {name: changed_weight(name, tensor) for name, tensor in weights.items()}
    try:
        worst = reference_differences(folder, changed, facts[0]["changed"], facts[0]["media_ids"])
    finally:
        save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    assert worst < TOLERANCE
    assert tracks(facts[0]["changed"]) != tracks(facts[0]["greedy"])


def test_restored_weights_give_the_old_rollouts_exactly(facts: list[dict[str, Any]]) -> None:
    def without_version(groups: list[RolloutGroup]) -> list[Any]:
        return [
            (p.first.response_ids, p.first.generator_logprobs, p.second.generator_logprobs)
            for g in groups
            for p in g.pairs
        ]

    assert without_version(facts[0]["restored"]) == without_version(facts[0]["greedy"])
    assert without_version(facts[0]["after_canary"]) == without_version(facts[0]["greedy"])


def test_an_engine_that_fails_is_restarted_with_the_present_weights(facts: list[dict[str, Any]]) -> None:
    """On rank 1, in the middle of a batch, after an update: every prompt is answered, to the same tokens."""
    assert tracks(facts[0]["recovered"]) == tracks(facts[0]["changed"])
    assert tracks(facts[1]["recovered"]) == tracks(facts[0]["changed"])
    assert facts[0]["recovered"][0].pairs[0].second.weight_version == 3


def test_rollouts_carry_the_weight_version(facts: list[dict[str, Any]]) -> None:
    versions = [
        facts[0][name][0].pairs[0].second.weight_version for name in ("greedy", "changed", "restored", "after_canary")
    ]
    assert versions == [0, 3, 4, 4]


def test_a_request_that_never_ends_is_cut_at_its_limit(facts: list[dict[str, Any]]) -> None:
    assert "length" in facts[0]["reasons"]
    rollouts = [rollout for group in facts[0]["alone"] for p in group.pairs for rollout in (p.first, p.second)]
    assert max(len(rollout.response_ids) for rollout in rollouts) == MAX_RESPONSE
    assert all(len(rollout.generator_logprobs) == len(rollout.response_ids) for rollout in rollouts)


def test_streaming_does_not_change_a_token(facts: list[dict[str, Any]]) -> None:
    assert tracks(facts[0]["alone"]) == tracks(facts[0]["barrier"])
    assert all(pair.second is not None for group in facts[0]["alone"] for pair in group.pairs)


def test_the_number_of_ranks_does_not_change_a_token(facts: list[dict[str, Any]]) -> None:
    assert tracks(facts[0]["shared"]) == tracks(facts[0]["alone"])
    assert tracks(facts[0]["shared"]) == tracks(facts[1]["shared"])
    assert [group.prompt.key for group in facts[1]["shared"]] == [f"p{index}" for index in range(8)]


def test_samples_and_steps_differ(facts: list[dict[str, Any]]) -> None:
    first = facts[0]["alone"]
    assert all(group.pairs[0].first.response_ids != group.pairs[1].first.response_ids for group in first)
    assert tracks(first) != tracks(facts[0]["other_step"])


def test_prompt_ids_hold_one_run_of_placeholders_per_image(facts: list[dict[str, Any]]) -> None:
    image_id = facts[0]["media_ids"][0]
    for group in facts[0]["alone"]:
        first = group.pairs[0].first.prompt_ids
        assert sum(a == image_id != b for a, b in zip(first, (0, *first), strict=False)) == len(group.prompt.images)
        assert image_id not in group.pairs[0].second.prompt_ids


def test_defect_6_media_ids_are_never_drawn(facts: list[dict[str, Any]]) -> None:
    assert len(facts[0]["banned_ids"]) == 50
    assert facts[0]["banned"] and not facts[0]["banned"] & set(facts[0]["banned_ids"])


def test_a_prompt_that_does_not_fit_is_refused_on_every_rank(facts: list[dict[str, Any]]) -> None:
    for rank_facts in facts:
        question, response = rank_facts["too_long"]
        assert "'long', first pass" in question and str(MAX_MODEL_TOKENS) in question
        assert "rollout.max_model_tokens" in question and "'p1'" not in question
        assert "'p1', first pass" in response and f"up to {MAX_MODEL_TOKENS}" in response
    assert facts[0]["too_long"] == facts[1]["too_long"]


def test_an_update_with_other_tensors_than_the_model_is_refused(facts: list[dict[str, Any]]) -> None:
    assert "no tensor 'extra'" in facts[0]["unknown"]
    assert "1 tensors are missing, first 'model.embed_tokens.weight'" in facts[0]["incomplete"]


def test_collectives_and_thread_settings_still_work(facts: list[dict[str, Any]]) -> None:
    assert [rank_facts["sum_of_ranks"] for rank_facts in facts] == [NUM_RANKS] * NUM_RANKS
    assert facts[0]["threads"] == 1


IMPORT_TORCHVISION = """
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops
define_missing_torchvision_ops()
define_missing_torchvision_ops()
import torch, torchvision.transforms.v2 as transforms
assert transforms.Resize(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
try:
    kept = torch.ops.torchvision.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    assert kept.tolist() == [0]
except NotImplementedError:
    pass  # a schema without a kernel says so
"""


def test_torchvision_can_be_imported_in_a_fresh_process() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_TORCHVISION], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
