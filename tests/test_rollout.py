"""The real engine, on two ranks that share a gloo group: one launch collects the facts, each test judges one."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_sr1.data.pictures import SOURCE_FORMATS, decode_picture
from megatron_sr1.types import SECOND, Prompt, PromptShare, RolloutGroup, Sampling
from tests.picture_cases import picture_files
from tests.ranks import run_ranks
from tests.rollout_cases import (
    MAX_MODEL_TOKENS,
    MAX_RESPONSE,
    PIXELS,
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


# ------------------------------------------------------------ what the two processes do
def collect(rank: int, num_ranks: int, folder: str) -> None:
    from megatron_sr1.platform import GroupRanks, TeamCounter
    from megatron_sr1.rollout import EngineLimits, Limits, Planner, TwoPassGenerator, stale_vision_canary

    model_dir = f"{folder}/model"
    engine = finishing_engine()(
        model_dir,
        EngineLimits(
            MAX_MODEL_TOKENS, max_running_requests=256, kv_cache_gib=0.25, max_images=2, seed=0, pixels=PIXELS
        ),
    )
    processor = describing_processor(model_dir)

    def generator(longest: int = MAX_RESPONSE, **changes: Any) -> TwoPassGenerator:
        return TwoPassGenerator(engine, Planner(processor, Limits(longest, MAX_MODEL_TOKENS, 100)), **changes)

    engines = GroupRanks()
    ours = generator(engines=engines)
    batch, greedy = prompts(8), sampling(temperature=0.0, num_samples=1)
    weights = load_file(f"{model_dir}/model.safetensors")
    changed = {name: changed_weight(name, tensor) for name, tensor in weights.items()}

    def together(how: Sampling, step: int, made: Any = None) -> list[RolloutGroup]:
        """The groups of both engines."""
        shares = [list(range(engine, len(batch), num_ranks)) for engine in range(num_ranks)]
        own = {place: batch[place] for place in shares[rank]}
        share = PromptShare([prompt.key for prompt in batch], own, shares, batch.__getitem__)
        held = engines.gather((made or ours).generate(share, how, step))
        return sorted(held, key=lambda group: group.group_id)

    facts: dict[str, Any] = {"greedy": together(greedy, 0), "media_ids": processor.media_ids}
    facts["shared"] = together(sampling(), 1)
    pulling = generator(engines=engines, counter=TeamCounter(engines, 1), slots=3)  # a group and a half, then by turns
    facts["pulled"] = together(sampling(), 1, pulling)
    facts["alone"] = generator().generate(PromptShare.whole(batch), sampling(), 1)
    facts["barrier"] = generator(streamed=False).generate(PromptShare.whole(batch), sampling(), 1)
    facts["reasons"] = set(engine.reasons)
    facts["other_step"] = generator().generate(PromptShare.whole(batch), sampling(), 2)
    facts["too_long"] = [
        refused(ours, [*batch, Prompt("long", "1 " * 1000, "0", batch[0].images)], sampling()),
        refused(generator(MAX_MODEL_TOKENS, engines=engines), batch, sampling(max_response_tokens=MAX_MODEL_TOKENS)),
    ]
    facts["unbanned"] = draw_freely(engine, processor, ())
    facts["banned_ids"] = tuple(sorted(facts["unbanned"])[:50])
    facts["banned"] = draw_freely(engine, processor, facts["banned_ids"])
    ours.update_weights(iter(changed.items()), version=3)
    facts["changed"] = together(greedy, 0)
    engine.steps_to_fault = 5 if rank == 1 else None
    recovering = generator(engines=engines, weights=changed.items)
    facts["recovered"] = together(greedy, 0, recovering)
    ours.update_weights(iter(weights.items()), version=4)
    facts["restored"] = together(greedy, 0)
    # as at start-up the engine keeps nothing of a batch, which on some CPUs is rounded otherwise than what is made anew
    ours.update_weights(iter(weights.items()), version=4)
    stale_vision_canary(engine, processor, batch[0].images[0], weights.items)
    facts["after_canary"] = together(greedy, 0)
    facts["pictures"] = compared_pictures(engine, processor, rank)
    facts["after_pictures"] = together(greedy, 0)
    facts["thinking"] = inside_the_block(engine, f"{folder}/thinking", batch)
    facts["unknown"] = refused_update(ours, [("extra", torch.ones(1)), *weights.items()])
    facts["incomplete"] = refused_update(ours, list(weights.items())[1:])
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    facts["sum_of_ranks"] = total.item()
    torch.set_num_threads(1)
    facts["threads"] = torch.get_num_threads()
    torch.save(facts, f"{folder}/facts{rank}.pt")


def compared_pictures(engine: Any, processor: Any, seed: int) -> dict[str, list[str]]:
    """Differences of picture files of every kind as the stream decodes them, and of what a careless reader makes of
    two of them."""
    from megatron_sr1.processor import Processor
    from megatron_sr1.prompts import COT
    from megatron_sr1.rollout.pixels import pixel_differences
    from megatron_sr1.rollout.plan import plan_first

    files = picture_files(seed)
    decoded = [Prompt(file.name, "?", "0", (decode_picture(file.data, SOURCE_FORMATS),)) for file in files]
    sideways, clear = turned_jpeg(), next(file for file in files if file.name.startswith("rgba.png"))
    careless = [
        Prompt(name, "?", "0", (Image.open(io.BytesIO(data)),))
        for name, data in (("turned", sideways), ("clear", clear.data))
    ]
    for prompt in careless:
        prompt.images[0].load()
    whole = Processor.from_pretrained(processor._tokenizer.name_or_path)  # without the limits that the engine has
    large = [Prompt("large", "?", "0", (Image.new("RGB", (280, 196), "red"),))]
    return {
        name: pixel_differences(engine, looking, [plan_first(looking, prompt, COT) for prompt in prompts])
        for name, looking, prompts in (
            ("decoded", processor, decoded),
            ("careless", processor, careless),
            ("limited", processor, large),
            ("unlimited", whole, large),
        )
    }


def inside_the_block(engine: Any, model_dir: str, batch: list[Prompt]) -> list[RolloutGroup]:
    """First and plain passes by the chat template of a thinking model."""
    from megatron_sr1.processor import Processor
    from megatron_sr1.rollout import Limits, Planner, TwoPassGenerator

    planner = Planner(Processor.from_pretrained(model_dir, pixels=PIXELS), Limits(MAX_RESPONSE, MAX_MODEL_TOKENS, 100))
    names = ("thinking", (), "thinking_reasoner", "thinking_cot")
    how = Sampling(1, 0.0, MAX_RESPONSE, 5, *names)
    return TwoPassGenerator(engine, planner).generate(PromptShare.whole(batch[:3]), how, 0)


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(buffer, format="JPEG", exif=exif.tobytes())
    return buffer.getvalue()


def refused(generator: Any, batch: list[Prompt], how: Sampling) -> str:
    try:
        generator.generate(PromptShare.whole(batch), how, 0)
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
    make_model(folder / "model")
    shutil.copytree(folder / "model", folder / "thinking", ignore=shutil.ignore_patterns("*.safetensors"))
    chat = folder / "thinking" / "chat_template.jinja"
    chat.write_text(chat.read_text().replace("assistant\n", "assistant\n<think>\n"))
    run_ranks(NUM_RANKS, collect, str(folder))
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"facts{rank}.pt", weights_only=False) for rank in range(NUM_RANKS)]


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


def test_restored_weights_give_the_old_rollouts(facts: list[dict[str, Any]]) -> None:
    def without_version(groups: list[RolloutGroup]) -> list[Any]:
        return [
            (rollout.response_ids, rollout.generator_logprobs)
            for g in groups
            for p in g.pairs
            for rollout in (p.first, p.second)
            if rollout is not None
        ]

    assert without_version(facts[0]["restored"]) == without_version(facts[0]["greedy"])
    after = zip(without_version(facts[0]["after_canary"]), without_version(facts[0]["greedy"]), strict=True)
    for (ids, logprobs), (expected_ids, expected) in after:
        assert ids == expected_ids
        assert logprobs == pytest.approx(expected, abs=TOLERANCE), "with an image that the canary has left embedded"


def test_trainer_and_engine_see_the_same_pixels_of_every_picture(facts: list[dict[str, Any]]) -> None:
    for fact in facts:
        assert fact["pictures"]["decoded"] == []
        assert fact["pictures"]["limited"] == []
        assert "grid (time, height, width) is (1, 8, 10), the trainer's (1, 12, 18)" in fact["pictures"]["unlimited"][1]
        turned, clear = fact["pictures"]["careless"]
        assert "sample 'turned', image 0: the engine's grid" in turned, "what EXIF turns, the engine turns"
        assert "sample 'clear', image 0: " in clear, "the engine puts transparent pixels on white"
        assert tracks(fact["after_pictures"]) == tracks(fact["greedy"]), "looking leaves nothing behind"


def test_an_engine_answers_inside_the_block_that_a_chat_template_opens(
    folder: Path, facts: list[dict[str, Any]]
) -> None:
    """The real engine takes the ids as they are; with and without images."""
    from megatron_sr1.processor import Processor
    from megatron_sr1.prompts import SHIPPED

    processor = Processor.from_pretrained(str(folder / "thinking"), pixels=PIXELS)
    for group in facts[0]["thinking"]:
        template = SHIPPED.by_name["thinking" if group.prompt.images else "thinking_cot"]
        images = group.prompt.images
        ids = processor.turn_ids(template.render(group.prompt.problem, len(images)), len(images))
        first = group.pairs[0].first
        assert first.prompt_ids == processor.expand(ids, [processor.grid(image.size) for image in images])
        assert processor.decode(first.prompt_ids).endswith("assistant\n<think>\n") and first.response_ids


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
    rollouts = [
        rollout
        for group in facts[0]["alone"]
        for p in group.pairs
        for rollout in (p.first, p.second)
        if rollout is not None
    ]
    assert max(len(rollout.response_ids) for rollout in rollouts) == MAX_RESPONSE
    assert all(len(rollout.generator_logprobs) == len(rollout.response_ids) for rollout in rollouts)


def test_streaming_does_not_change_a_token(facts: list[dict[str, Any]]) -> None:
    assert tracks(facts[0]["alone"]) == tracks(facts[0]["barrier"])
    for group in facts[0]["alone"]:
        assert all((pair.second is not None) == bool(group.prompt.images) for pair in group.pairs)


def test_the_number_of_ranks_does_not_change_a_token(facts: list[dict[str, Any]]) -> None:
    assert tracks(facts[0]["shared"]) == tracks(facts[0]["alone"])
    assert tracks(facts[0]["shared"]) == tracks(facts[1]["shared"])
    assert [group.prompt.key for group in facts[1]["shared"]] == [f"p{index}" for index in range(8)]


def test_engines_that_take_prompts_by_turns_change_no_token(facts: list[dict[str, Any]]) -> None:
    for rank_facts in facts:
        assert tracks(rank_facts["pulled"]) == tracks(facts[0]["alone"])
        assert [group.prompt.key for group in rank_facts["pulled"]] == [f"p{index}" for index in range(8)]


def test_samples_and_steps_differ(facts: list[dict[str, Any]]) -> None:
    first = facts[0]["alone"]
    assert all(group.pairs[0].first.response_ids != group.pairs[1].first.response_ids for group in first)
    assert tracks(first) != tracks(facts[0]["other_step"])


def test_prompt_ids_hold_one_run_of_placeholders_per_image(facts: list[dict[str, Any]]) -> None:
    image_id = facts[0]["media_ids"][0]
    for group in facts[0]["alone"]:
        first = group.pairs[0].first.prompt_ids
        assert sum(a == image_id != b for a, b in zip(first, (0, *first), strict=False)) == len(group.prompt.images)
        second = group.pairs[0].second
        assert second is None or image_id not in second.prompt_ids


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


def test_a_prompt_that_does_not_fit_is_found_when_the_data_is_read(folder: Path) -> None:
    """By the same rule as the generator's: the prompts it takes pass, those it refuses do not."""
    from megatron_sr1.loops.generation import prompt_check
    from megatron_sr1.processor import Processor
    from megatron_sr1.rollout import Limits, Planner
    from megatron_sr1.types import Passes

    processor = Processor.from_pretrained(str(folder / "model"), pixels=PIXELS)
    planner = Planner(processor, Limits(MAX_RESPONSE, MAX_MODEL_TOKENS, 100))
    check = prompt_check(planner, lambda _: Passes("see_think", (SECOND,)))
    image = (Image.new("RGB", (28, 28)),)
    for each in prompts(8):
        check(each)
    with pytest.raises(ValueError, match=r"'long', first pass.*\n.*'long', second pass.*limit of 512"):
        check(Prompt("long", "1 " * 1000, "0", image))
    near = Prompt(
        "near", "1 " * 150, "0", (Image.new("RGB", (28, 28)),)
    )  # only with its description, which joins the second pass, is it too long
    with pytest.raises(ValueError, match=r"^sample 'near', second pass") as caught:
        check(near)
    assert "first pass" not in str(caught.value)


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
