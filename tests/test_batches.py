"""From groups and rewards to micro-batches: every response token gets its stream's advantage and weight, once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from megatron_sr1.config import Config, ConfigError, load_config
from megatron_sr1.packing import gather_rows
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import COT, SEE_THINK
from megatron_sr1.ranks import ALONE, OneRank, Ranks
from megatron_sr1.streams import PRESETS, Preset, preset_from_config
from megatron_sr1.training.batches import Batcher, StreamBatch, rollout_advantages
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Prompt, SftSample, TemplateName
from tests.batch_cases import GOOD, SECOND, their_rewards, two_groups
from tests.step_cases import rows_of, trained


@pytest.fixture(scope="module")
def processor(tiny_model_dir: str) -> Processor:
    return Processor.from_pretrained(tiny_model_dir)


def _config(*overrides: str) -> Config:
    return load_config(None, ["train.micro_batch_tokens=256", *overrides])


def _streams(processor: Processor, config: Config, ranks: Ranks = ALONE) -> StreamBatch:
    preset = preset_from_config(config.objective)
    return _packed(Batcher(config, processor, ranks), config, trained(processor, preset), preset, ranks)


def _packed(
    batcher: Batcher, config: Config, rollouts: StepRollouts, preset: Preset, ranks: Ranks = ALONE
) -> StreamBatch:
    ledger = rollouts.ledger
    advantages = rollout_advantages(ledger, ledger.rollout_rewards, preset, config.objective.advantage_eps)
    return batcher.streams(rows_of(batcher, rollouts, preset, ranks), advantages, preset)


def _weights(batch: StreamBatch) -> list[torch.Tensor]:
    return [row.token_weights for row in batch.tokens]


def _by_sequence(batch: StreamBatch, values: list[torch.Tensor]) -> list[torch.Tensor]:
    count = 1 + max(int(micro.row_sequence.max()) for micro in batch.micro_batches)
    return gather_rows(values, batch.micro_batches, count)


def test_each_pass_carries_its_own_advantage(processor: Processor) -> None:
    batch = _streams(processor, _config())
    advantages = _by_sequence(batch, batch.advantages)
    weights = _by_sequence(batch, _weights(batch))
    # first, second of (0,0); first, second of (0,1); first, second of (1,0); first of (1,1)
    assert len(advantages) == 7
    z = 0.5**0.5  # two rewards, sample standard deviation: +-1/sqrt(2)
    expected_answer = [z, z, -z, -z, z, z, -z]  # acc + 0.1 fmt
    expected_visual = [-z, -z, z, z, z, z, -z]
    for row, (answer, visual) in enumerate(zip(expected_answer, expected_visual, strict=True)):
        is_second = row in (1, 3, 5)
        assert advantages[row][0].tolist() == pytest.approx([answer] * advantages[row].shape[1], rel=1e-4)
        assert advantages[row][1].tolist() == pytest.approx([visual] * advantages[row].shape[1], rel=1e-4)
        assert bool(weights[row][0].any()) is not is_second, "the answer stream trains first passes only"
        assert bool(weights[row][1].any()) is is_second, "the visual stream trains second passes only"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_token_mean_weights_add_to_one_per_stream(processor: Processor, preset: str) -> None:
    config = _config(f"objective.preset={preset}")
    rewards = {**their_rewards(), "fmt_cot": torch.zeros(4)}
    chosen = preset_from_config(config.objective)
    streams = tuple(replace(stream, contrast_entropy_reward=0.0) for stream in chosen.streams)  # nobody scores here
    chosen = replace(chosen, streams=streams)
    batch = _packed(Batcher(config, processor, ALONE), config, trained(processor, chosen, rewards), chosen)
    totals = sum(weights.sum(1) for weights in _weights(batch))
    assert totals.tolist() == pytest.approx([1.0] * len(chosen.streams), rel=1e-5)


def test_perception_credit_splits_the_first_pass_at_the_description_block(processor: Processor) -> None:
    batch = _streams(processor, _config("objective.preset=perception_credit"))
    weights = _by_sequence(batch, _weights(batch))
    groups = two_groups(processor)
    names = [stream.tokens for stream in PRESETS["perception_credit"].streams]
    reasoning, description = names.index("reasoning"), names.index("description")
    first = groups[0].pairs[0].first
    credited = [token for token, weight in zip(first.response_ids, weights[0][description], strict=True) if weight > 0]
    assert processor.decode(credited).strip() == "<description> The digits are 3 7 . </description>"
    others = [token for token, weight in zip(first.response_ids, weights[0][reasoning], strict=True) if weight > 0]
    assert r"\boxed{10}" in processor.decode(others) and "digits are" not in processor.decode(others)
    assert len(credited) + len(others) == len(first.response_ids), "every token belongs to exactly one of the two"
    assert len(weights) == 4, "what no stream credits is not scored"
    assert not weights[3][description].any(), "no description, no tokens in its stream"
    assert weights[3][reasoning].all()


def test_replicas_share_the_groups_and_keep_global_denominators(processor: Processor) -> None:
    whole = _streams(processor, _config())
    parts = [_streams(processor, _config(), OneRank(index, 2)) for index in range(2)]
    assert sum(len(micro.targets) for part in parts for micro in part.micro_batches) == whole.num_tokens
    totals = [sum(weights.sum(1) for weights in _weights(part)) for part in parts]
    assert (totals[0] + totals[1]).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    for part in parts:
        assert part.num_tokens == whole.num_tokens
        for micro in part.micro_batches:
            assert len(micro.images) <= 1, "a replica has one group, and its samples share their image"


def test_siblings_share_one_image_and_generator_logprobs_stay_aligned(processor: Processor) -> None:
    batch = _streams(processor, _config("train.micro_batch_tokens=4096"))
    (micro,) = batch.micro_batches
    assert len(micro.images) == 2, "four first passes over two images"
    expected = -0.01 * micro.row_offset.float()
    assert torch.allclose(batch.tokens[0].generator_logprobs, expected)


def test_tokens_know_how_far_their_image_is(processor: Processor) -> None:
    groups = two_groups(processor)
    batch = _streams(processor, _config())
    distances = _by_sequence(batch, [row.image_distance for row in batch.tokens])
    first, second = groups[0].pairs[0].first, groups[0].pairs[0].second
    assert second is not None and set(distances[1].tolist()) == {-1.0}, "a second pass sees no image"
    ids = (*first.prompt_ids, *first.response_ids)
    last = max(place for place, token in enumerate(ids) if token == processor.image_token_id)
    starts = len(first.prompt_ids)
    assert distances[0].tolist() == [place - last for place in range(starts, len(ids))]


def test_counts_of_kinds_are_those_of_the_whole_step(processor: Processor) -> None:
    whole = _streams(processor, _config())
    parts = [_streams(processor, _config(), OneRank(index, 2)) for index in range(2)]
    assert all(part.num_of_kind == whole.num_of_kind for part in parts)
    pairs = [pair for group in two_groups(processor) for pair in group.pairs]
    assert whole.num_of_kind["text"] == sum(len(pair.second.response_ids) for pair in pairs if pair.second is not None)
    assert sum(whole.num_of_kind.get(name, 0) for name in ("text", "near_image", "far_image")) == whole.num_tokens
    assert min(whole.num_of_kind.values()) > 0, "a kind that does not occur has no mean"


def test_sft_takes_both_layouts(processor: Processor) -> None:
    prompt = Prompt("p", "What is the sum of all digits?", "10", (Image.new("RGB", (56, 28)),))
    samples = [
        SftSample(prompt, "see_think", GOOD),
        SftSample(replace(prompt, images=()), "caption_reasoner", SECOND, description="The digits are 3 7 ."),
    ]
    batch = Batcher(_config(), processor, ALONE).sft(samples)
    num_tokens = sum(len(processor.response_ids(sample.response)) for sample in samples)
    assert sum(len(micro.targets) for micro in batch.micro_batches) == num_tokens
    assert sum(weights.sum().item() for weights in batch.token_weights) == pytest.approx(1.0)
    assert sum(len(micro.images) for micro in batch.micro_batches) == 1


@pytest.mark.parametrize("template", ["see_think", "cot"])
@pytest.mark.parametrize("num_images", [0, 1])
def test_a_demonstration_is_trained_with_the_prompt_of_its_template(
    processor: Processor, template: TemplateName, num_images: int
) -> None:
    images = (Image.new("RGB", (56, 28)),) * num_images
    prompt = Prompt("p", "What is the sum of all digits?", "10", images)
    (micro,) = Batcher(_config(), processor, ALONE).sft([SftSample(prompt, template, SECOND)]).micro_batches
    asked = {"see_think": SEE_THINK.user_text(prompt.problem), "cot": COT.user_text(prompt.problem, num_images)}
    grids = [processor.grid(image.size) for image in images]
    ids = processor.expand(processor.prompt_ids(asked[template], num_images), grids)
    assert tuple(micro.input_ids[: len(ids)].tolist()) == ids


# ---------------------------------------------------------------- rows of a layout
def test_rows_have_the_multiples_of_the_layout(processor: Processor) -> None:
    config = _config(
        *("nproc=4", "layout.tensor=2", "layout.context=2", "layout.sequence_parallel=true"),
        *("precision.dtype=fp8", "precision.fp8_recipe=mxfp8", "train.micro_batch_tokens=500"),
    )
    assert (config.sequence_multiple, config.row_multiple) == (4, 128)
    batch = _streams(processor, config)
    plain = _streams(processor, _config("train.micro_batch_tokens=500"))
    for micro in batch.micro_batches:
        assert len(micro.input_ids) in (128, 256, 384), "500 tokens have room for three times 128"
        assert not (micro.cu_seqlens % 4).any()
    ours, theirs = (_by_sequence(item, _weights(item)) for item in (batch, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "padding changes no weight"


def test_a_budget_below_one_row_is_refused_at_once(processor: Processor) -> None:
    layout = ("nproc=4", "layout.tensor=2", "layout.context=2", "layout.sequence_parallel=true")
    fp8 = ("precision.dtype=fp8", "precision.fp8_recipe=blockwise")
    with pytest.raises(ConfigError, match=r"train.micro_batch_tokens=256 .* at least 512"):
        Batcher(_config(*layout, *fp8), processor, ALONE)


def test_no_pixel_is_read_and_images_stay_on_the_host(processor: Processor) -> None:
    device = torch.device("meta")
    prompt = Prompt("p", "What is the sum of all digits?", "10", (Image.new("RGB", (56, 28)),))
    batch = Batcher(_config(), processor, ALONE, device).sft([SftSample(prompt, "see_think", GOOD)])
    assert sum(len(micro.images) for micro in batch.micro_batches) == 1
    for micro in batch.micro_batches:
        assert {value.device for value in vars(micro).values() if isinstance(value, torch.Tensor)} == {device}
        for image in micro.images:
            assert not image.patches.started, "patches are made by the rank that encodes the image"
            assert image.pixel_values.device.type == "cpu"


def test_the_head_needs_a_gradient_only_where_the_loss_depends_on_a_token(processor: Processor) -> None:
    """Group 1 has equal answers: without a KL term nothing of its first passes is trained on; with one, all is."""
    rewards = their_rewards() | {"acc": torch.tensor([1.0, 0.0, 1.0, 1.0]), "fmt": torch.ones(4)}
    config = _config("objective.kl_coef=0", "objective.preset=see_think")
    preset = preset_from_config(config.objective)
    batch = _packed(Batcher(config, processor, ALONE), config, trained(processor, preset, rewards), preset)
    dead = []
    for micro in batch.micro_batches:
        wanted = torch.ones_like(micro.targets, dtype=torch.bool)
        if micro.grad_rows is not None:
            wanted = torch.zeros_like(wanted)
            wanted[micro.grad_rows] = True
        dead.append((~wanted).float())
    by_sequence = _by_sequence(batch, dead)
    # first passes alone: the others are not trained by this preset
    assert [bool(row.all()) for row in by_sequence] == [False, False, True, True]
    assert not any(by_sequence[row].any() for row in (0, 1))
    assert all(micro.grad_rows is None for micro in _streams(processor, _config()).micro_batches)


def test_a_bonus_needs_every_credited_token_and_a_kl_in_the_reward_none(processor: Processor) -> None:
    """Group 1 earns the same throughout: a KL in the reward is in its advantages alone, which are given here."""
    rewards = their_rewards() | {"acc": torch.tensor([1.0, 0.0, 1.0, 1.0]), "fmt": torch.ones(4)}
    kept = {}
    for name, switches in {
        "reward": ("objective.kl_in=reward", "objective.kl_estimator=k1"),
        "loss": ("objective.kl_in=loss",),
        "bonus": ("objective.kl_coef=0", "objective.entropy_coef=0.01"),
        "none": ("objective.kl_coef=0",),
    }.items():
        config = _config("objective.preset=see_think", *switches)
        preset, batcher = preset_from_config(config.objective), Batcher(config, processor, ALONE)
        rollouts = trained(processor, preset, rewards)
        known = rollouts.ledger.rollout_rewards
        advantages = rollout_advantages(rollouts.ledger, known, preset, 1e-6, torch.zeros(1, 4, 1))
        batch = batcher.streams(rows_of(batcher, rollouts, preset), advantages, preset)
        rows = [torch.arange(len(m.targets)) if m.grad_rows is None else m.grad_rows for m in batch.micro_batches]
        kept[name] = sum(len(row) for row in rows)
        assert {micro.entropy_grad for micro in batch.micro_batches} == {name == "bonus"}
    first = [len(pair.first.response_ids) for group in two_groups(processor) for pair in group.pairs]
    assert kept == {"reward": sum(first[:2]), "loss": sum(first), "bonus": sum(first), "none": sum(first[:2])}


@pytest.mark.parametrize(("overrides", "tokens"), [((), 2048), (("objective.constant_tokens=50",), 50)])
def test_a_constant_divides_every_response_alike(processor: Processor, overrides: tuple[str, ...], tokens: int) -> None:
    batch = _streams(processor, _config("objective.aggregation=constant", *overrides))
    found = {weight for row in _weights(batch) for weight in row.unique().tolist()}
    assert sorted(found) == pytest.approx([0.0, 1 / (4 * tokens)], rel=1e-6)
