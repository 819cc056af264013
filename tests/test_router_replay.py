"""A mixture's routers follow what was chosen before: against transformers, whose routers are led the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sr1.config import Config, ConfigError, ModelConfig, Replay, load_config, replay_of
from megatron_sr1.config.router_replay import check_router_replay
from megatron_sr1.estimate.activations import kept_experts
from megatron_sr1.packing import gather_rows
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import OneRank
from megatron_sr1.streams import check_siblings, preset_from_config
from megatron_sr1.training.expert_ids import as_words, experts_of, num_words, of_words
from megatron_sr1.training.ledger import FIRST, slots_of
from megatron_sr1.training.payload import Payload, share_responses
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_files import rollouts_file, step_lines
from megatron_sr1.types import Rollout, RolloutGroup, Routing, Scoring, TokenSequence
from tests.batch_cases import their_rewards, two_groups
from tests.freeze_cases import published_tensors
from tests.model_zoo import create_family
from tests.policy_cases import BUDGET, TOLERANCE, MeanLoss, built, make_sequences, packed_rows, relative_error
from tests.ranks import run_ranks
from tests.routing_cases import (
    CHOSEN,
    EXPERTS,
    LAYERS,
    as_given,
    choices,
    led,
    same_experts,
    transformers_routers,
    with_experts,
)
from tests.step_cases import rollouts_of
from tests.test_saved_rollouts import Listed, groups, save, saved, spoil
from tests.trainer_cases import TEMPERATURE, log_softmax

NOISE = 1e-3  # of a router's logits
SMALL_GATES = 0.01  # the zoo's are far from a tie; with these experts lie as near as those of a large model
REPLAY = Replay("generator", LAYERS, CHOSEN, EXPERTS)


# ---------------------------------------------------------------- the policy, against transformers
def _scores(model: Any, sequence: TokenSequence, processor: Processor) -> Tensor:
    log_p = log_softmax(model, sequence, processor)
    return log_p.gather(1, torch.tensor(list(sequence.response_ids))[:, None])[:, 0]


def _theirs(model_dir: str) -> Any:
    import transformers

    kind = transformers.Qwen3VLMoeForConditionalGeneration
    return kind.from_pretrained(model_dir, dtype=torch.float32, experts_implementation="eager")


def _rows(policy: Any, config: Config, processor: Processor, change: Any) -> tuple[list[Any], Scoring]:
    batches, _ = packed_rows(policy, config, processor, BUDGET, True, change)
    return batches, Scoring(TEMPERATURE, processor.media_ids)


def _check_led(model_dir: str) -> None:
    """The log-probs and every gradient, the routers' among them, of a model whose routers are given others' choices."""
    from megatron_sr1.weights import export_hf_weights

    processor, model = Processor.from_pretrained(model_dir), _theirs(model_dir)
    sequences = [led(sequence) for sequence in make_sequences(processor)]
    theirs = []
    for sequence in sequences:
        with transformers_routers(model, given=sequence.experts):
            theirs.append(_scores(model, sequence, processor))
    num_tokens = sum(map(len, theirs))
    (-torch.cat(theirs).sum() / num_tokens).backward()
    with built(model_dir, ("optimizer.clip_grad=1e9",)) as (policy, config):
        batches, scoring = _rows(policy, config, processor, led)
        assert max(max(batch.parents) for batch in batches) >= 0, "a prompt is shared"
        found = gather_rows([each.logprobs for each in policy.logprobs(batches, scoring)], batches, len(sequences))
        for ours, expected in zip(found, theirs, strict=True):
            assert relative_error(ours, expected.detach()) < TOLERANCE
        policy.train_step(batches, MeanLoss(num_tokens), scoring)
        wanted = published_tensors(model, policy.architecture, lambda parameter: parameter.grad)
        gradients = export_hf_weights(
            policy.chunks, policy.architecture, policy.groups, read=lambda parameter: parameter.main_grad
        )
        routers = 0
        for name, gradient in gradients:
            assert relative_error(gradient, wanted[name]) < TOLERANCE, name
            routers += name.endswith("mlp.gate.weight") and bool(gradient.abs().max() > 0)
        assert routers == LAYERS, "the gradient reaches every router"


def _check_noise(model_dir: str) -> None:
    """A generator whose routers are off by NOISE: with its choices the trainer is less than a tenth as far from it."""
    processor, model = Processor.from_pretrained(model_dir), _theirs(model_dir)
    sequences, theirs = make_sequences(processor), []
    with torch.no_grad():
        for number, sequence in enumerate(sequences):
            with transformers_routers(model, noise=NOISE, seed=number) as heard:
                theirs.append(_scores(model, sequence, processor))
            sequences[number] = replace(sequence, experts=as_given(heard))
    chosen = {(tuple(one.prompt_ids), tuple(one.response_ids)): one.experts for one in sequences}

    def given(sequence: TokenSequence) -> TokenSequence:
        return replace(sequence, experts=chosen[tuple(sequence.prompt_ids), tuple(sequence.response_ids)])

    with built(model_dir, ()) as (policy, config):
        gaps, used = {}, {}
        for name, change in (("with", given), ("without", lambda one: one)):
            batches, _ = packed_rows(policy, config, processor, BUDGET, False, change)
            batches = [replace(batch, routing=batch.routing or Routing()) for batch in batches]
            scores = policy.logprobs(batches, Scoring(TEMPERATURE, processor.media_ids))
            found = gather_rows([score.logprobs for score in scores], batches, len(sequences))
            gaps[name] = torch.cat([(ours - gen).abs() for ours, gen in zip(found, theirs, strict=True)]).mean().item()
            used[name] = _agreement(batches, chosen)
        own = sum(int(each) for batch in batches for each in batch.routing.agreed.values())
        assert own == sum(len(one.response_ids) for one in sequences) * LAYERS * CHOSEN, "its own choice is its own"
    assert gaps["without"] > 10 * gaps["with"] > 0, gaps
    assert used["with"] == 1.0 > used["without"] > 0.5, used


def _agreement(batches: list[Any], chosen: dict[Any, Tensor]) -> float:
    """Share of all scored tokens' choices that are the generator's, of rows without shared prefixes."""
    ours, theirs = [], []
    per_sequence = list(chosen.values())
    prompts = [len(prompt) for prompt, _ in chosen]
    for batch in batches:
        if batch.routing.given is None:
            used = torch.stack([batch.routing.kept[place] for place in range(LAYERS)], 1)  # [T, M, k]
        else:
            used = batch.routing.given
        ours.append(used[batch.loss_rows])
        pairs = zip(batch.row_sequence.tolist(), batch.row_offset.tolist(), strict=True)
        theirs += [per_sequence[index][prompts[index] - 1 + offset] for index, offset in pairs]
    return same_experts(torch.cat(ours), torch.stack(theirs)).item()


def _check_kept(model_dir: str) -> None:
    """The first pass chooses; what comes later follows, whatever it would choose: other weights, and the reference."""
    processor = Processor.from_pretrained(model_dir)
    with built(model_dir, (), keep_reference=True) as (policy, config):
        batches, scoring = _rows(policy, config, processor, lambda one: one)
        plain = policy.logprobs(batches, scoring)
        rows = [replace(batch, routing=Routing()) for batch in batches]
        first = policy.logprobs(rows, scoring)
        assert all(torch.equal(one.logprobs, other.logprobs) for one, other in zip(plain, first, strict=True))
        (count,) = policy.stage_counts()
        planned = kept_experts(policy.architecture, config, count, sum(len(row.input_ids) for row in rows))
        assert planned == sum(ids.nbytes for row in rows for ids in row.routing.kept.values())
        kept = [{place: ids.clone() for place, ids in row.routing.kept.items()} for row in rows]
        for chunk in policy.chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith("router.weight"):
                    parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        stacked = [torch.stack([ids[place] for place in range(LAYERS)], 1) for ids in kept]
        everywhere = [torch.ones(len(batch.input_ids), dtype=torch.bool) for batch in batches]
        told = [
            replace(batch, routing=Routing(ids, all_of_it))
            for batch, ids, all_of_it in zip(batches, stacked, everywhere, strict=True)
        ]
        for score in (policy.logprobs, policy.reference_logprobs):
            ours, theirs = score(rows, scoring), score(told, scoring)
            assert all(torch.equal(one.logprobs, other.logprobs) for one, other in zip(ours, theirs, strict=True))
        later, anew = policy.logprobs(rows, scoring), policy.logprobs(batches, scoring)
        assert max(relative_error(a.logprobs, b.logprobs) for a, b in zip(later, anew, strict=True)) > 1e-3
        assert all(
            torch.equal(ids, row.routing.kept[place])
            for row, known in zip(rows, kept, strict=True)
            for place, ids in known.items()
        )
        agreed = sum(int(each) for row in rows for each in row.routing.agreed.values())
        scored = sum(len(batch.targets) for batch in batches) * LAYERS * CHOSEN
        assert 0.2 * scored < agreed < 0.99 * scored, "the new routers would choose others"


# ---------------------------------------------------------------- the trainer
def _led_groups(processor: Processor) -> list[RolloutGroup]:
    groups = []
    for group in two_groups(processor):
        pairs = [
            replace(
                pair,
                first=with_experts(pair.first, brings_prompt=pair.sample_index == 0),
                second=None if pair.second is None else with_experts(pair.second, brings_prompt=True),
            )
            for pair in group.pairs
        ]
        groups.append(replace(group, pairs=tuple(pairs)))
    return groups


STEP = (
    *("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.micro_batch_tokens=512"),
    *("objective.max_logprob_gap=1000", "optimizer.lr=1e-2", "optimizer.eps=1e-8"),
)


def _check_trainer(model_dir: str) -> None:
    """Whose passes there are, in which order, and what they follow; what is reported of it."""
    from megatron_sr1.training.trainer import Trainer

    processor = Processor.from_pretrained(model_dir)
    found = {}
    for who, size, old in (
        ("trainer", 2, "trainer"),
        ("trainer", 1, "trainer"),
        ("trainer", 1, "generator"),
        ("generator", 1, "trainer"),
    ):
        overrides = (*STEP, f"train.batch_size={size}", f"objective.old={old}", f"objective.router_replay={who}")
        with built(model_dir, overrides, keep_reference=True) as (policy, config):
            replay, preset = replay_of(config), preset_from_config(config.objective)
            assert replay == replace(REPLAY, who=who)
            seen: list[tuple[str, list[Any]]] = []
            _watch(policy, seen)
            recorder = Recorder.of(preset, 2, processor, "train", replay)
            rollouts = rollouts_of(_led_groups(processor), their_rewards(), preset, recorder)
            results = Trainer(config, policy, preset, processor, replay).update(rollouts)
            found[who, size, old] = ([name for name, _ in seen], [one.metrics["router/agreement"] for one in results])
            if who == "trainer":
                assert _followed(seen)
            else:
                _check_given(seen[0][1], processor)
    calls, agreed = found["trainer", 2, "trainer"]
    assert calls == ["logprobs", "reference", "train"] and agreed == [1.0], "it chooses before its reference does"
    calls, agreed = found["trainer", 1, "trainer"]
    assert calls == ["logprobs", "logprobs", "reference", "train", "reference", "train"], "for all steps before any"
    assert agreed[0] == 1.0 > agreed[1] > 0.5, "the second step's routers have moved"
    assert found["trainer", 1, "generator"][0] == calls, "whose old log-probs spare the pass"
    calls, agreed = found["generator", 1, "trainer"]
    assert len(calls) == 6 and 0.2 < agreed[0] < 0.8, "nobody chose these"


def _watch(policy: Any, seen: list[tuple[str, list[Any]]]) -> None:
    def noted(name: str, call: Any) -> Any:
        def run(batches: Any, *rest: Any) -> Any:
            inside = name == "logprobs" and bool(seen) and seen[-1] == ("reference", [])
            if not inside:
                seen.append((name, []))
            result = call(batches, *rest)
            if not inside:
                seen[-1] = (
                    name,
                    [(batch, {p: ids.clone() for p, ids in batch.routing.kept.items()}) for batch in batches],
                )
            return result

        return run

    policy.logprobs = noted("logprobs", policy.logprobs)
    policy.reference_logprobs = noted("reference", policy.reference_logprobs)
    policy.train_step = noted("train", policy.train_step)


def _followed(seen: list[tuple[str, list[Any]]]) -> bool:
    """Whether every pass over a row left what the first had kept."""
    first: dict[int, dict[int, Tensor]] = {}
    for _, batches in seen:
        for batch, kept in batches:
            known = first.setdefault(id(batch.routing), kept)
            assert kept.keys() == known.keys() == set(range(LAYERS))
            if not all(torch.equal(ids, known[place]) for place, ids in kept.items()):
                return False
    return len(first) == sum(len(batches) for name, batches in seen if name == "logprobs")


def _check_given(batches: list[Any], processor: Processor) -> None:
    """A scored token's experts are those of its place in its sequence."""
    lengths = {
        len(rollout.prompt_ids)
        for group in two_groups(processor)
        for pair in group.pairs
        for rollout in (pair.first, pair.second)
        if rollout
    }
    table = choices()
    for batch, kept in batches:
        assert kept == {}
        given = batch.routing.given[batch.loss_rows]
        for number in batch.row_sequence.unique().tolist():
            own = batch.row_sequence == number
            starts = [p for p in lengths if torch.equal(given[own], table[p - 1 : p - 1 + int(own.sum())])]
            assert len(starts) == 1, number


def _walk(rank: int, num_ranks: int, folder: str) -> None:
    _check_led(f"{folder}/model")
    _check_noise(f"{folder}/near")
    _check_kept(f"{folder}/model")
    _check_trainer(f"{folder}/model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("router_replay")
    for name in ("model", "near"):
        create_family(folder / name, "qwen3_vl_moe")
    path = folder / "near" / "model.safetensors"
    tensors = {
        name: tensor * SMALL_GATES if name.endswith("mlp.gate.weight") else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_policy_follows_what_was_chosen_as_transformers_does(folder: Path) -> None:
    run_ranks(1, _walk, str(folder))


# ---------------------------------------------------------------- ids on their way
@pytest.mark.parametrize("experts", [EXPERTS, 300])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_ids_are_words_and_back(experts: int, num_tokens: int) -> None:
    replay = replace(REPLAY, layers=3, experts=experts)
    ids = torch.randint(0, experts, (num_tokens, 3, CHOSEN)).to(torch.uint8 if experts == EXPERTS else torch.int16)
    words = as_words(ids)
    assert len(words) == num_words(num_tokens, replay) and words.dtype == torch.int32
    assert torch.equal(of_words(words, num_tokens, replay), ids)
    assert num_words(num_tokens, replace(replay, who="trainer")) == 0


def test_a_rollouts_experts_are_its_prompts_and_its_responses() -> None:
    rollout = Rollout("0/p/0/first", (1, 2, 3), (4, 5), "", (-0.1, -0.1), "stop", 0)
    prompt, response = experts_of(with_experts(rollout, brings_prompt=True), REPLAY)
    assert torch.equal(prompt, choices()[:3]) and torch.equal(response, choices()[3:4])
    prompt, response = experts_of(with_experts(rollout, brings_prompt=False), REPLAY)
    assert prompt is None and torch.equal(response, choices()[3:4])
    assert experts_of(rollout, replace(REPLAY, who="trainer")) == (None, None)
    wide = np.array([[[1, 299]] * LAYERS], dtype=np.uint16)
    _, response = experts_of(replace(rollout, experts=wide.tobytes()), replace(REPLAY, experts=300))
    assert response.tolist() == wide.tolist()


@pytest.mark.parametrize(
    ("experts", "text"),
    [
        (b"", "nobody noted which experts .* Set objective.router_replay=trainer"),
        (bytes(7), "7 bytes of experts for 3 prompt and 2 response ids .* Give the model.hf_dir"),
        (bytes(2 * LAYERS * CHOSEN), "16 bytes of experts"),
        (bytes([EXPERTS]) * (LAYERS * CHOSEN), "sent to expert 4, but the model has 4"),
    ],
)
def test_experts_that_do_not_fit_are_refused(experts: bytes, text: str) -> None:
    rollout = Rollout("0/p/0/first", (1, 2, 3), (4, 5), "", (-0.1, -0.1), "stop", 0, experts=experts)
    with pytest.raises(ValueError, match=text):
        experts_of(rollout, REPLAY)


class Counting(OneRank):
    """Alone, with the words that it sends itself."""

    def swap(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        WORDS.append(sum(map(len, pieces)))
        return super().swap(pieces, sizes)


WORDS: list[int] = []


def test_each_replica_gets_the_experts_of_its_responses(tiny_model_dir: str) -> None:
    """Siblings have the prompt's of the first one, and it is sent to a replica once."""
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_from_config(Config().objective)
    rollouts = rollouts_of(
        _led_groups(processor), their_rewards(), preset, Recorder.of(preset, 2, processor, "train", REPLAY)
    )
    ledger = rollouts.ledger
    (share,) = share_responses(ledger, slots_of(preset), 1)
    WORDS.clear()
    table = choices()
    tracks = Payload(Counting(), [0], REPLAY).fetch(ledger, [share], rollouts.tracks)
    told = {
        number: {at: replace(track, prompt_experts=None, response_experts=None) for at, track in each.items()}
        for number, each in rollouts.tracks.items()
    }
    Payload(Counting(), [0]).fetch(ledger, [share], told)
    for place, track in zip(share, tracks, strict=True):
        p, n = len(track.prompt_ids), len(track.response_ids)
        assert torch.equal(track.prompt_experts, table[:p]), place
        assert torch.equal(track.response_experts, table[p : p + n - 1]), place
    assert len(share) == 7
    prompts = {
        place.group: num_words(len(track.prompt_ids), REPLAY)
        for place, track in zip(share, tracks, strict=True)
        if place.slot == FIRST
    }
    asked = sum(
        num_words(len(track.prompt_ids), REPLAY)
        for place, track in zip(share, tracks, strict=True)
        if place.slot != FIRST
    )
    answered = sum(num_words(len(track.response_ids) - 1, REPLAY) for track in tracks)
    assert WORDS[0] - WORDS[1] == sum(prompts.values()) + asked + answered


# ---------------------------------------------------------------- the configuration
def _config(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.hf_dir={folder / 'model'}", *overrides])


def test_a_mixture_replays_its_trainer_unless_it_is_told_otherwise(folder: Path, tiny_model_dir: str) -> None:
    assert replay_of(_config(folder)) == replace(REPLAY, who="trainer")
    for who in ("none", "trainer", "generator"):
        config = _config(folder, f"objective.router_replay={who}")
        check_router_replay(config)
        assert replay_of(config).who == who
    dense = Config(model=ModelConfig(hf_dir=tiny_model_dir))
    check_router_replay(dense)
    assert replay_of(dense).who == "none"
    with pytest.raises(ConfigError, match=r"router_replay='trainer' .* the model has no experts"):
        check_router_replay(load_config(None, [f"model.hf_dir={tiny_model_dir}", "objective.router_replay=trainer"]))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("rollout.engine_tensor=2", "nproc=2"), "rollout.engine_tensor=2: vLLM tells the first rank"),
        (("objective.distorted={samples: 2, strength: 0.5}",), "siblings are drawn from noisy images"),
        (("objective.router_replay=both",), "one of none, trainer, generator"),
        (("rollout.engine={enable_prefix_caching: false}",), "vLLM keeps the experts of tokens by the blocks"),
        (("rollout.engine={aux_output_config: {}}",), "Set objective.router_replay"),
    ],
)
def test_what_cannot_be_replayed_is_refused(folder: Path, overrides: tuple[str, ...], text: str) -> None:
    from megatron_sr1.config.engine_arguments import check_engine_arguments

    with pytest.raises(ConfigError, match=text):
        config = _config(folder, "objective.router_replay=generator", *overrides)
        check_router_replay(config)
        check_siblings(preset_from_config(config.objective).distorted, config)
        check_engine_arguments(config.rollout.engine)


def test_experts_come_back_whole(tmp_path: Path) -> None:
    """To the byte, of every pass; a step that nobody noted any of is written as ever."""
    made = groups()
    save(tmp_path / "without", made)
    assert all("experts" not in line["first"] for line in step_lines(rollouts_file(tmp_path / "without", 0)))
    told = [
        replace(
            group,
            pairs=tuple(
                replace(pair, first=replace(pair.first, experts=bytes([group.group_id, 255, 0, pair.sample_index])))
                for pair in group.pairs
            ),
        )
        for group in made
    ]
    save(tmp_path, told)
    assert saved(tmp_path, Listed.of(told)).groups == told != made
    path = rollouts_file(tmp_path, 0)
    spoil(path, first=step_lines(path)[2]["first"] | {"experts": "no base64"})
    with pytest.raises(ValueError, match=r"0/p/0/first: its experts are no base64"):
        saved(tmp_path, Listed.of(told))
