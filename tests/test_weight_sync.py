"""Weights from trainers of several layouts into engines of one and two ranks. transformers, which reads them from disk,
judges what arrived."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_sr1.packing import gather_rows, pack
from megatron_sr1.processor import Processor
from megatron_sr1.types import Scoring, TokenSequence
from tests.model_zoo import TEXTS, ZOO, create_family, name_by_place, publish_experts
from tests.policy_cases import MeanLoss, built, make_sequences, packed_rows
from tests.ranks import run_ranks
from tests.routing_cases import CHOSEN, LAYERS, same_experts, transformers_routers

NUM_RANKS = 2
TOLERANCE = 1e-3  # nats
MAX_TOKENS = 12
SIZES = ((84, 56), (56, 56), (120, 90))
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_WIDE = {"num_attention_heads": 2, "rope_parameters": _ROPE}  # vLLM's CPU attention has no heads narrower than 32
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen2_5_vl_tied", {**_WIDE, "num_key_value_heads": 2}),
    "one_kv_head": ("qwen2_5_vl_untied", {**_WIDE, "num_key_value_heads": 1}),  # both engine ranks hold it
    "deepstack": ("qwen3_vl", {}),
    # vLLM's CPU experts come in steps of 32, for each rank
    "experts": ("qwen3_vl_moe", {"moe_intermediate_size": 128}),
    "recurrent": ("qwen3_5_moe", {"moe_intermediate_size": 64}),
    "recurrent_dense": ("qwen3_5_tied", {}),
}
MIXTURE = ("layout.tensor=2", "layout.sequence_parallel=true", "layout.expert=2")
FILLED_LATER = {(1, "deepstack"), (2, "experts"), (2, "one_kv_head")}
SYNCS = {  # ranks of an engine -> family and trainer layout; vLLM makes a process's expert groups with its first model
    1: (
        ("experts", MIXTURE),
        ("tied", ("layout.tensor=2",)),
        ("deepstack", ("layout.pipeline=2",)),
        ("recurrent_dense", ("layout.tensor=2", "layout.sequence_parallel=true")),
    ),
    2: (
        ("experts", ("layout.pipeline=2",)),
        ("one_kv_head", ("layout.tensor=2",)),
        ("recurrent", ("layout.pipeline=2",)),
    ),
}
KV_CACHE_GIB = 0.0625
RESTARTED = ("layout.tensor=2",)  # a restart takes as long as a start
RESTARTS = {"tied": 5, "one_kv_head": 2}


# ------------------------------------------------------------ what the ranks do
def collect(rank: int, num_ranks: int, folder: str, engine_ranks: int) -> None:
    facts = {}
    for name, layout in SYNCS[engine_ranks]:
        engine = _engine(f"{folder}/{name}/engine", engine_ranks, filled_later=(engine_ranks, name) in FILLED_LATER)
        facts[name] = _sync(folder, name, layout, engine)
    if rank == 0:
        torch.save(facts, f"{folder}/facts{engine_ranks}.pt")


def _sync(parent: str, name: str, layout: tuple[str, ...], engine: Any) -> dict[str, Any]:
    """An engine that was loaded from one model, or from none, gets another from the policy, which then trains on."""
    folder = f"{parent}/{name}"
    processor = Processor.from_pretrained(f"{folder}/engine")
    facts: dict[str, Any] = {"before": _first_answers(engine, processor)}
    with built(f"{folder}/policy", (*layout, "rollout.sync_bucket_mib=1")) as (policy, config):
        facts["missed"] = _missed(engine, policy)
        engine.update_weights(policy.hf_weights(), version=1)
        engine.sleep()
        facts["synced"] = _answers(engine, processor, 0.0)
        if layout == RESTARTED:
            facts["resident"] = [_restarted_bytes(engine) for _ in range(RESTARTS[name])]
            facts["restarted"] = (engine.weight_version, _first_answers(engine, processor))
        batches, _ = packed_rows(policy, config, processor)
        num_tokens = sum(len(sequence.response_ids) for sequence in make_sequences(processor))
        for version in range(5):
            policy.train_step(batches, MeanLoss(num_tokens), Scoring())
            engine.update_weights(policy.hf_weights(), version)
        facts["trained"], facts["experts"] = _gaps(engine, processor, policy, config)
        facts["buckets"] = _bucket_facts(policy, load_file(f"{folder}/policy/model.safetensors"))
    return facts


def _restarted_bytes(engine: Any) -> int:
    """What this process holds when the engine has started again."""
    model = weakref.ref(engine._model)
    engine.restart()
    assert model() is None, "the old model went"
    return psutil.Process().memory_info().rss


def _engine(model_dir: str, engine_ranks: int, *, filled_later: bool) -> Any:
    from megatron_sr1.rollout import Engine, EngineLimits

    notes = model_dir.endswith("experts/engine") and engine_ranks == 1
    sizes = {"kv_cache_gib": KV_CACHE_GIB, "max_images": 2, "seed": 0, "tensor_parallel": engine_ranks}
    limits = EngineLimits(256, 128, **sizes, notes_experts=notes)
    return Engine(model_dir, limits, sleeps=True, filled_later=filled_later)


def _images(number: int) -> tuple[Any, ...]:
    from PIL import Image

    generator = torch.Generator().manual_seed(number)
    sizes = [SIZES[(number + i) % 3] for i in range((1, 0, 2, 1)[number % 4])]
    pixels = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes]
    return tuple(Image.fromarray(each.numpy()) for each in pixels)


def _answers(engine: Any, processor: Processor, temperature: float, num_samples: int = 1) -> list[Any]:
    """Generations of four prompts with 1, 0, 2 and 1 images, in order."""
    from megatron_sr1.rollout.request import Draw

    for number in range(4):
        images = _images(number)
        encoded = [processor.encode_image(image) for image in images]
        ids = processor.prompt_ids(TEXTS[number % 2], len(images))
        prepared = engine.prepare(processor.expand(ids, [image.grid_thw for image in encoded]), encoded)
        for sample in range(num_samples):
            tokens = MAX_TOKENS if num_samples == 1 else 24
            draw = Draw(temperature, tokens, 100 * number + sample, processor.end_of_turn_id, processor.media_ids)
            engine.add(f"{number}/{sample}", prepared, draw)
    done = []
    while engine.has_unfinished():
        done += engine.step()
    return sorted(done, key=lambda generation: [int(x) for x in generation.request_id.split("/")])


def _first_answers(engine: Any, processor: Processor) -> list[Any] | str:
    """Those of an engine that no update has reached, or why it gives none."""
    try:
        return _answers(engine, processor, 0.0)
    except ValueError as error:
        return str(error)


@contextmanager
def _without(name: str) -> Iterator[None]:
    """An engine that leaves the named repair after a reload undone."""
    from megatron_sr1.rollout.vllm import reload

    repair = vars(reload)[name]
    setattr(reload, name, lambda model: None)
    try:
        yield
    finally:
        setattr(reload, name, repair)


def _missed(engine: Any, policy: Any) -> dict[str, str]:
    """What the check of the first update says where the engine keeps old weights, or gets one wrong."""
    messages = {}
    for name in ("_repack_output_head", "_repack_experts"):
        with _without(name):
            messages[name] = _refusal(lambda: engine.update_weights(policy.hf_weights(), 1))
    real = type(engine)._complete

    def corrupted(self: Any, weights: Any, check: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in real(self, weights, check):
            if name.endswith(("layers.1.self_attn.v_proj.weight", "blocks.2.norm1.weight")):
                tensor = tensor.clone()
                tensor.view(-1)[-1] += 1e-6  # on the last engine rank
            yield name, tensor

    type(engine)._complete = corrupted
    try:
        messages["corrupted"] = _refusal(lambda: engine.update_weights(policy.hf_weights(), 1))
    finally:
        type(engine)._complete = real
    said: list[dict[str, str]] = [{} for _ in range(NUM_RANKS)]
    torch.distributed.all_gather_object(said, messages)
    return said[-1]


def _refusal(call: Callable[[], None]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def _gaps(engine: Any, processor: Processor, policy: Any, config: Any) -> tuple[Tensor, dict[str, Any]]:
    """|trainer - generator| of every token drawn at temperature 1, on the first rank's engine; of one that notes where
    it sends tokens, what it has noted, how many of the choices of scored tokens are the trainer's own, and of how many.
    """
    drawn = [_answers(engine, processor, 1.0, num_samples=14)]
    torch.distributed.broadcast_object_list(drawn, 0)  # with two engines of one rank both give the same, by their seeds
    encoded = [tuple(processor.encode_image(image) for image in _images(number)) for number in range(4)]
    sequences = [
        TokenSequence(
            one.prompt_ids, one.response_ids, encoded[int(one.request_id.split("/")[0])], experts=_experts(one)
        )
        for one in drawn[0]
    ]
    batches = pack(
        sequences,
        max_tokens=256,
        row_multiple=config.row_multiple,
        sequence_multiple=config.sequence_multiple,
        image_token_id=processor.image_token_id,
        merge_size=processor.merge_size,
    )
    scores = policy.logprobs(batches, Scoring(1.0, processor.media_ids))
    ours = gather_rows([score.logprobs for score in scores], batches, len(sequences))
    theirs = [torch.tensor(one.logprobs) for one in drawn[0]]
    gaps = torch.cat([(a - b).abs() for a, b in zip(ours, theirs, strict=True)])
    routings = [batch.routing for batch in batches if batch.routing is not None]
    own = sum(_of_all([int(each) for routing in routings for each in routing.agreed.values()]))
    noted = [(one.request_id, len(one.prompt_ids), _experts(one)) for one in drawn[0]]
    chosen = sum(len(batch.targets) for batch in batches) * LAYERS * CHOSEN
    return gaps, {"noted": noted, "own": own, "chosen": chosen} if routings else {}


def _experts(one: Any) -> Tensor | None:
    """[n - 1, M, k] of a generation."""
    ids = torch.frombuffer(bytearray(one.experts), dtype=torch.uint8) if one.experts else None
    return None if ids is None else ids.view(-1, LAYERS, CHOSEN)


def _of_all(items: list[int]) -> list[int]:
    """Of all ranks."""
    found: list[list[int]] = [[] for _ in range(NUM_RANKS)]
    torch.distributed.all_gather_object(found, items)
    return [item for part in found for item in part]


def _bucket_facts(policy: Any, shapes: dict[str, Tensor]) -> dict[int, tuple[int, int, bool]]:
    """For each bucket size: exchanges, the largest, and whether the tensors are right and hold no bucket in memory."""
    from megatron_sr1.weights import export, export_hf_weights

    facts = {}
    expected = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    assert {name: t.numel() for name, t in expected.items()} == {name: t.numel() for name, t in shapes.items()}
    real = export._gathered
    for bucket_bytes in (1, 2**18, 2**30):
        sizes: list[int] = []

        def recorded(*arguments: Any, sizes: list[int] = sizes) -> Tensor:
            part = real(*arguments)
            sizes.append(part.nbytes)
            return part

        export._gathered = recorded
        try:
            stream = export_hf_weights(policy.chunks, policy.architecture, policy.groups, bucket_bytes=bucket_bytes)
            equal = all(
                torch.equal(tensor, expected[name])
                and (policy.groups.pipeline.size() == 1 or tensor.untyped_storage().nbytes() == tensor.nbytes)
                for name, tensor in stream
            )
        finally:
            export._gathered = real
        facts[bucket_bytes] = (len(sizes), max(sizes), equal)
    return facts


# ------------------------------------------------------------ one launch for each size of engine
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of every family: what the engine starts from, as published, and what the policy starts from."""
    folder = tmp_path_factory.mktemp("sync")
    for name, (family, overrides) in FAMILIES.items():
        for number, role in enumerate(("engine", "policy")):
            model_dir = create_family(folder / name / role, family, seed=number, **overrides)
            if name == "experts" and role == "engine":
                publish_experts(model_dir)
            if name == "tied" and role == "engine":
                name_by_place(model_dir)
    return folder


@pytest.fixture(scope="module", params=SYNCS)
def facts(request: pytest.FixtureRequest, folder: Path) -> dict[str, dict[str, Any]]:
    run_ranks(NUM_RANKS, collect, str(folder), request.param)
    return torch.load(folder / f"facts{request.param}.pt", weights_only=False)


def _difference(folder: Path, name: str, role: str, answers: list[Any]) -> float:
    """The largest |log-prob difference| of greedy answers to transformers; every token must be its argmax."""
    import transformers

    model_dir, family = folder / name / role, FAMILIES[name][0]
    model = getattr(transformers, ZOO[family].class_name).from_pretrained(model_dir, dtype=torch.float32).eval()
    processor, worst = Processor.from_pretrained(str(model_dir)), 0.0
    for number, answer in enumerate(answers):
        ids = torch.tensor([answer.prompt_ids + answer.response_ids])
        images = [processor.encode_image(image) for image in _images(number)]
        vision: dict[str, Any] = {"mm_token_type_ids": (ids == processor.image_token_id).int()}
        if images:
            vision["pixel_values"] = torch.cat([image.pixel_values for image in images])
            vision["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        with torch.no_grad(), transformers_routers(model) as heard:
            logits = model(input_ids=ids, **vision).logits[0, len(answer.prompt_ids) - 1 : -1]
        if answer.experts:
            assert same_experts(_experts(answer), torch.stack(heard, 1)[:-1]) == 1.0, (name, number)
        logits[:, list(processor.media_ids)] -= 100.0
        chosen = torch.tensor(answer.response_ids)
        assert torch.equal(logits.argmax(-1), chosen), (name, role, number)
        found = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        worst = max(worst, (found - torch.tensor(answer.logprobs)).abs().max().item())
    return worst


def test_synced_engines_give_transformers_logprobs_of_the_policys_model(
    folder: Path, facts: dict[str, dict[str, Any]]
) -> None:
    for name, found in facts.items():
        assert _difference(folder, name, "policy", found["synced"]) < TOLERANCE, name
        if isinstance(found["before"], str):
            assert "engine without weights" in found["before"], name
            continue
        if name != "experts":  # transformers reads its own layout of experts only, the engine the published one
            assert _difference(folder, name, "engine", found["before"]) < TOLERANCE, name
        assert [one.response_ids for one in found["synced"]] != [one.response_ids for one in found["before"]]


def test_an_engine_that_is_filled_later_takes_no_request_before(
    facts: dict[str, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    engine_ranks = request.node.callspec.params["facts"]
    refusing = {(engine_ranks, name) for name, found in facts.items() if isinstance(found["before"], str)}
    assert refusing == {each for each in FILLED_LATER if each[0] == engine_ranks}


def test_a_restarted_engine_is_as_it_was_started(facts: dict[str, dict[str, Any]]) -> None:
    restarted = {name: found for name, found in facts.items() if "restarted" in found}
    assert restarted
    for name, found in restarted.items():
        version, answers = found["restarted"]
        assert version == 0 and answers == found["before"], name
        growth = max(found["resident"][1:]) - found["resident"][0]
        assert growth < KV_CACHE_GIB * 2**30, f"{growth >> 20} MiB in four restarts: the KV cache alone is 64 in each"


def test_every_family_is_synced() -> None:
    assert {name for cases in SYNCS.values() for name, _ in cases} == set(FAMILIES)


def test_trainer_and_generator_agree_after_five_updates(facts: dict[str, dict[str, Any]]) -> None:
    for name, found in facts.items():
        assert len(found["trained"]) >= 1000, name
        assert found["trained"].max() < TOLERANCE, name


def test_an_engine_tells_where_it_sends_each_token(
    facts: dict[str, dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    """Where transformers sends it (see `_difference`), after updates where the trainer would; a prompt that siblings
    share where the first of them was sent."""
    told = {name: found["experts"] for name, found in facts.items() if found["experts"]}
    assert set(told) == ({"experts"} if request.node.callspec.params["facts"] == 1 else set())
    for found in told.values():
        assert found["own"] == found["chosen"] > 0
        of_prompt: dict[str, list[Tensor]] = {}
        for name, length, experts in found["noted"]:
            of_prompt.setdefault(name.split("/")[0], []).append(experts[:length])
        assert all(torch.equal(one, prompts[0]) for prompts in of_prompt.values() for one in prompts)
        assert len(of_prompt) == 4 and len(found["noted"]) == 56


def test_the_checksums_name_what_did_not_arrive(facts: dict[str, dict[str, Any]]) -> None:
    for name, found in facts.items():
        missed, entry = found["missed"], ZOO[FAMILIES[name][0]]
        assert ("embed_tokens" in missed["_repack_output_head"]) == entry.tied, name
        assert ("mlp.experts" in missed["_repack_experts"]) == ("num_experts" in entry.text), name
        assert "checksums of 2 tensors" in missed["corrupted"], name
        assert "layers.1.self_attn.v_proj.weight" in missed["corrupted"] or "blocks.2.norm1" in missed["corrupted"], (
            name
        )


def test_a_bucket_is_no_larger_than_it_may_be(facts: dict[str, dict[str, Any]]) -> None:
    """And the larger it may be, the fewer collectives there are; no size changes a tensor."""
    for name, found in facts.items():
        (most, largest, _), (some, bounded, _), (fewest, whole, _) = found["buckets"].values()
        assert all(equal for _, _, equal in found["buckets"].values()), name
        assert most > some > fewest and fewest <= 6, name  # three sections, from each of two stages
        assert bounded <= max(2**18, largest) and whole > bounded, name
