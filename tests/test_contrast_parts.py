"""Contrasts by their parts: weights against a plain reading of their formulas, prompts, pictures, refusals."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from megatron_sr1.config import ConfigError, load_config
from megatron_sr1.loops.generation import contrast_check
from megatron_sr1.objective import dependency, divergence, response_weights, token_weighting
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE
from megatron_sr1.streams import Contrast, preset_from_config, preset_of
from megatron_sr1.training.batches import Batcher
from megatron_sr1.training.contrast_scores import of_siblings
from megatron_sr1.training.contrasts import ContextMaker
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.trainer import Trainer
from megatron_sr1.types import RolloutGroup, TokenSequence
from tests.batch_cases import two_groups
from tests.step_cases import rollouts_of, rows_of, trained
from tests.test_trainer import Recorder as PolicyOfNobody

CONFIG = load_config(None, [])


def test_dependency_is_k3_within_its_bounds() -> None:
    own = torch.tensor([-1.0, -1.0, -1.0, -0.5, -50.0, 0.0])
    under = torch.tensor([-1.0, -2.0, -0.5, -0.5, 0.0, -50.0])
    expected = [0.0, math.exp(-1) + 1 - 1, math.exp(0.5) - 0.5 - 1, 0.0, 10.0, 10.0]
    assert dependency(own, under).tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(dependency(own, own), torch.zeros(6)), "a context with itself"


def test_divergence_has_both_gradients() -> None:
    own = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    under = torch.tensor([-2.0, -1.0], dtype=torch.float64, requires_grad=True)
    value = divergence(own, under)
    assert value.tolist() == pytest.approx([math.exp(-1.0), math.exp(2.0) - 3.0])
    value.sum().backward()
    slopes = [1 - math.exp(-1.0), 1 - math.exp(2.0)]
    assert own.grad is not None and under.grad is not None
    assert own.grad.tolist() == pytest.approx(slopes) and under.grad.tolist() == pytest.approx([-x for x in slopes])


def test_weights_by_hand() -> None:
    """Five tokens of which four are credited: D = 3 1 . 0 4, the top half of the four are the last and the first."""
    depends = torch.tensor([3.0, 1.0, 9.0, 0.0, 4.0])
    credited = torch.tensor([True, True, False, True, True])

    def weights(kind: Any, share: float = 0.5) -> list[float]:
        return token_weighting(depends, credited, kind, share, 0.1).tolist()

    assert weights("none") == [1, 1, 1, 1, 1]
    assert weights("top") == [1, 0, 1, 0, 1]
    assert weights("top_conserving") == [2, 0, 1, 0, 2]
    assert weights("proportional") == [1.5, 0.5, 1, 0, 2]
    assert weights("top", 0.51) == [1, 1, 1, 0, 1], "three of four: a part of a token counts"
    zeros, everything = torch.zeros(3), torch.ones(3).bool()
    assert token_weighting(zeros, everything, "top", 0.5, 0.1).tolist() == [1, 1, 0], "the earlier ones"
    assert token_weighting(zeros, everything, "proportional", 0.5, 0.1).tolist() == [1, 1, 1]
    assert token_weighting(depends, torch.zeros(5).bool(), "top", 0.5, 0.1).tolist() == [1, 1, 1, 1, 1]
    # m = 1 2 4: z = 0 1/3 1, its mean 4/9
    found = response_weights(torch.tensor([1.0, 2.0, 4.0]), 0.9, "dependent").tolist()
    assert found == pytest.approx([0.9, 0.975, 1.125])
    assert response_weights(torch.tensor([2.0, 2.0]), 0.9, "dependent").tolist() == [1, 1]
    assert response_weights(torch.zeros(0), 0.9, "dependent").tolist() == []


def test_weights_of_random_responses() -> None:
    """Against loops over tokens; mass is conserved where it says so."""
    drawn = random.Random(0)
    for _ in range(200):
        number, share = drawn.randint(1, 30), drawn.choice([0.1, 0.4, 0.75, 1.0])
        depends = [drawn.random() ** 3 for _ in range(number)]
        credited = [drawn.random() < 0.7 for _ in range(number)]
        places = [place for place in range(number) if credited[place]]
        best = set(sorted(places, key=lambda place: -depends[place])[: math.ceil(share * len(places))])
        total = sum(depends[place] for place in places)
        for kind in ("top", "top_conserving", "proportional"):
            found = token_weighting(torch.tensor(depends), torch.tensor(credited), kind, share, 0.1).tolist()
            for place in range(number):
                expected = 1.0
                if credited[place]:
                    scale = len(places) / len(best) if kind == "top_conserving" else 1.0
                    expected = scale * (place in best)
                    expected = len(places) * depends[place] / total if kind == "proportional" else expected
                assert found[place] == pytest.approx(expected, rel=1e-5), (kind, place)
            if kind != "top":
                assert sum(found) == pytest.approx(number, rel=1e-5)


def _sequence(processor: Processor, num_images: int = 1, said: str = "hello") -> TokenSequence:
    images = tuple(
        processor.encode_image(Image.effect_noise((56, 28 * (1 + number)), 90).convert("RGB"))
        for number in range(num_images)
    )
    ids = processor.prompt_ids("What is it?", num_images)
    expanded = processor.expand(ids, [image.grid_thw for image in images])
    return TokenSequence(expanded, processor.response_ids(said), images)


def test_what_is_asked_without_an_image(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    make = ContextMaker(processor, CONFIG, 0)
    sequence = _sequence(processor, 2, "<description> a 3 </description> 3")
    none = torch.zeros(len(sequence.response_ids), dtype=torch.bool)
    blind = make.sequence(Contrast("blind"), sequence, none, "a", -1)
    assert blind is not None and blind.images == () and blind.response_ids == sequence.response_ids
    assert processor.decode(blind.prompt_ids) == processor.decode(processor.prompt_ids("What is it?", 0))
    told = Contrast("told", "description")
    assert make.sequence(told, sequence, none, "a", -1) is None, "nothing is described"
    described = none.clone()
    block = processor.text_ids("<description> a 3 </description>")
    described[: len(block)] = True
    other = make.sequence(told, sequence, described, "a", -1)
    assert other is not None and other.images == ()
    at = next(i for i, token in enumerate(sequence.prompt_ids) if token in processor.media_ids)
    expected = [*sequence.prompt_ids[:at], *sequence.response_ids[: len(block)]]
    assert list(other.prompt_ids[: len(expected)]) == expected, "in the place of the first image"
    assert len(other.prompt_ids) == len(blind.prompt_ids) + len(block), "once"


def test_masked_and_other_pixels(tiny_model_dir: str) -> None:
    """Drawn anew for each step, prompt and image; siblings see the same; what is not masked stays."""
    processor = Processor.from_pretrained(tiny_model_dir)
    sequence, none = _sequence(processor, 2), torch.zeros(0)

    def patches(context: Any, step: int = 0, key: str = "a", share: float = 0.5) -> list[torch.Tensor]:
        other = ContextMaker(processor, CONFIG, step).sequence(Contrast("c", context, share), sequence, none, key, -1)
        assert other is not None and other.prompt_ids == sequence.prompt_ids
        return [image.patches() for image in other.images]

    before = [image.patches() for image in sequence.images]
    for context in ("masked", "noise"):
        found = patches(context)
        assert all(torch.equal(a, b) for a, b in zip(found, patches(context), strict=True))
        for step, key in ((1, "a"), (0, "b")):
            assert not torch.equal(found[1], patches(context, step, key)[1]), (context, step, key)
    for old, new in zip(before, patches("masked"), strict=True):
        hidden = (new == 0).all(1)
        assert 0 < hidden.sum() < len(new) and torch.equal(new[~hidden], old[~hidden])
    assert all((new == 0).all() for new in patches("masked", share=1.0))
    make = ContextMaker(processor, CONFIG, 0)
    siblings = [make.sequence(Contrast("c", "masked"), sequence, none, "a", -1) for _ in range(2)]
    assert siblings[0] is not None and siblings[1] is not None and siblings[0].images[0] is siblings[1].images[0]


def test_the_image_stays_as_it_is_for_everyone_else(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    sequence = _sequence(processor)
    before = sequence.images[0].patches().clone()
    other = ContextMaker(processor, CONFIG, 0).sequence(Contrast("c", "masked"), sequence, torch.zeros(0), "a", -1)
    assert other is not None and not torch.equal(other.images[0].patches(), before)
    assert torch.equal(sequence.images[0].patches(), before)


def test_rows_of_contrasts(tiny_model_dir: str) -> None:
    """First passes alone; where one describes nothing, its description is no context; values find their tokens."""
    contrasts = "[{name: blind, context: no_image}, {name: told, context: description}]"
    config = load_config(None, [f"objective.contrast={contrasts}", "train.micro_batch_tokens=256"])
    processor = Processor.from_pretrained(tiny_model_dir)
    preset = preset_of(config)
    assert preset.measured == ("response", "description", "think", "answer")
    rows = rows_of(Batcher(config, processor, ALONE), trained(processor, preset), preset)
    assert rows.num_responses == 7 and {name: len(o.sequences) for name, o in rows.contrasts.items()} == {
        "blind": 4,
        "told": 3,
    }
    segments = torch.cat([tokens.segments for tokens in rows.tokens], 1)  # [E, all tokens]
    pairs = [pair for group in two_groups(processor) for pair in group.pairs]
    assert segments[0].sum() == sum(len(pair.first.response_ids) for pair in pairs)
    assert 0 < segments[1].sum() < segments[0].sum() and not (segments[1] & segments[2]).any()
    for name, other in rows.contrasts.items():
        ids = [batch.targets.float() for batch in other.micro_batches]
        found, there = other.onto_own(ids, rows.micro_batches, rows.num_responses)
        for values, has, batch in zip(found, there, rows.micro_batches, strict=True):
            assert torch.equal(values, batch.targets.float() * has), name
        assert sum(int(has.sum()) for has in there) == sum(len(each) for each in ids)
        back = other.from_own([b.targets.float() for b in rows.micro_batches], rows.micro_batches, rows.num_responses)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(back, ids, strict=True)), name


def test_a_description_is_told_as_far_as_one_may_be_and_as_a_row_has_room(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    said = "<description> " + "3 " * 40 + "</description> 3"
    sequence = _sequence(processor, 1, said)
    described = torch.zeros(len(sequence.response_ids), dtype=torch.bool)
    described[: len(processor.text_ids(said)) - 3] = True
    lengths = {}
    for most in (8, 1024):
        config = load_config(None, [f"rollout.max_description_tokens={most}"])
        other = ContextMaker(processor, config, 0).sequence(
            Contrast("told", "description"), sequence, described, "a", -1
        )
        assert other is not None
        lengths[most] = len(other.prompt_ids)
    assert lengths[1024] - lengths[8] == int(described.sum()) - 8
    room = lengths[8] + len(sequence.response_ids)
    for tokens, fits in ((room, True), (room - 1, False)):
        config = load_config(None, ["rollout.max_description_tokens=8", f"train.micro_batch_tokens={tokens}"])
        make = ContextMaker(processor, config, 0)
        assert (make.sequence(Contrast("told", "description"), sequence, described, "a", -1) is not None) is fits


class Listening(PolicyOfNobody):
    """Keeps what it is asked to score."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.0)
        self.asked: list[Any] = []

    def logprobs(self, batches: Any, scoring: Any) -> Any:
        self.asked += batches
        return super().logprobs(batches, scoring)


def test_the_metadata_may_stand_for_the_image(tiny_model_dir: str) -> None:
    """Each prompt's own text, where its image was; a prompt without an image needs none."""
    words = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=2", "objective.kl_coef=0"]
    gold = "objective.contrast=[{name: gold, context: metadata, field: facts}]"
    config = load_config(None, [*words, "objective.preset=see_think", gold, "objective.max_logprob_gap=9"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    groups = [
        replace(group, prompt=replace(group.prompt, metadata={"facts": facts}))
        for group, facts in zip(two_groups(processor), (["3", "7"], ["9", "1"]), strict=True)
    ]
    made, policy = Recorder.of(preset, 2, processor, "train"), Listening()
    rollouts = rollouts_of(groups, None, preset, made)
    Trainer(config, cast(Policy, policy), preset, processor).update(rollouts)
    text = "".join(processor.decode(batch.input_ids.tolist()) for batch in policy.asked)
    assert text.count("3, 7") == 1 and text.count("9, 1") == 1, "of two siblings each, who share it"
    assert not any(batch.images for batch in policy.asked)
    check = contrast_check(preset, lambda sample: None)
    for group in groups:
        check(group.prompt)
        check(replace(group.prompt, images=(), metadata={}))
        for bad in ({}, {"facts": []}, {"facts": " "}, {"facts": [3]}):
            with pytest.raises(ValueError, match=rf"sample '{group.prompt.key}': the contrast 'gold' reads.*'facts'"):
                check(replace(group.prompt, metadata=bad))


def test_prompts_of_two_data_sets_may_have_one_key(tiny_model_dir: str) -> None:
    """Each is masked in its own image: of other sizes here, so that one for both would not even fit."""
    processor = Processor.from_pretrained(tiny_model_dir)
    config = load_config(None, ["objective.preset=papo", "train.micro_batch_tokens=512"])
    preset = preset_of(config)
    first, second = two_groups(processor)
    image = Image.new("RGB", (28, 28 * 3), (9, 200, 9))
    ids = processor.expand(processor.prompt_ids("What?", 1), [processor.grid(image.size)])
    pairs = tuple(replace(pair, first=replace(pair.first, prompt_ids=ids), second=None) for pair in second.pairs)
    groups = [first, RolloutGroup(1, replace(first.prompt, images=(image,)), pairs)]
    made = Recorder.of(preset, 2, processor, "train")
    rows = rows_of(Batcher(config, processor, ALONE), rollouts_of(groups, None, preset, made), preset)
    shown = [image.grid_thw for row in rows.contrasts["masked"].micro_batches for image in row.images]
    assert sorted(shown) == sorted(processor.grid(group.prompt.images[0].size) for group in groups)


class Odd(PolicyOfNobody):
    """Whose first token of a response without an image is as good as banned; it wants finite gradients."""

    def train_step(self, batches: Any, loss_fn: Any, scoring: Any) -> StepResult:
        scores = self._logprobs(batches)
        for batch, one in zip(batches, scores, strict=True):
            one.logprobs[(batch.row_offset == 0) & (len(batch.images) == 0)] = -111.0
            one.logprobs.requires_grad_()
        found = [loss_fn(index, one) for index, one in enumerate(scores)]
        metrics = {name: sum(float(each[name]) for _, each in found) for name in found[0][1]}
        loss, leaves = sum(each for each, _ in found), [one.logprobs for one in scores]
        assert isinstance(loss, torch.Tensor)
        for gradient in torch.autograd.grad(loss, leaves, allow_unused=True):
            assert gradient is None or bool(gradient.isfinite().all())
        return StepResult(metrics, 0.0, 0.0)


@pytest.mark.parametrize("preset_name", ["papo", "vppo"])
def test_what_a_contrast_does_not_have_is_no_part_of_it(tiny_model_dir: str, preset_name: str) -> None:
    """A prompt without an image beside one that has some, with a token of almost no probability."""
    words = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=2", "objective.kl_coef=0"]
    more = [f"objective.preset={preset_name}", "objective.max_logprob_gap=1000", "train.micro_batch_tokens=256"]
    config = load_config(None, [*words, *more])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    first, second = two_groups(processor)
    ids = processor.prompt_ids("What?", 0)
    pairs = tuple(replace(pair, first=replace(pair.first, prompt_ids=ids), second=None) for pair in second.pairs)
    groups = [first, RolloutGroup(1, replace(second.prompt, images=()), pairs)]
    rollouts = rollouts_of(groups, None, preset, Recorder.of(preset, 2, processor, "train"))
    policy = Odd(0.0, 0.0)
    rows = rows_of(Batcher(config, processor, ALONE), rollouts, preset)
    assert len(rows.contrasts["masked"].sequences) == 2 and len(rows.micro_batches) > 1
    (result,) = Trainer(config, cast(Policy, policy), preset, processor).update(rollouts)
    assert all(math.isfinite(value) for value in result.metrics.values()), result.metrics
    assert any(row.images == () for row in rows.micro_batches), "or no token is so unlikely"


def test_a_response_without_another_context_earns_what_its_siblings_do() -> None:
    nan = math.nan
    gaps = torch.tensor([[1.0, 3.0, nan], [nan, nan, nan], [0.5, 0.5, 0.5]], dtype=torch.float64)
    assert of_siblings(gaps).tolist() == [[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]


def test_own_log_probs_are_taken_where_a_contrast_of_the_policy_needs_them(tiny_model_dir: str) -> None:
    """A contrast of the start has those of the reference's pass."""
    words = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=2", "objective.kl_coef=0"]
    processor = Processor.from_pretrained(tiny_model_dir)
    for weights, passes in (("policy", 1), ("reference", 0)):
        contrast = f"objective.contrast=[{{name: a, weights: {weights}}}]"
        stream = "objective.streams=[{name: answer, contrast: a, contrast_reward: 1, sequence_weight_low: 0.5}]"
        config = load_config(None, [*words, "objective.preset=see_think", contrast, stream])
        preset, policy = preset_of(config), PolicyOfNobody(0.0, 0.0)
        Trainer(config, cast(Policy, policy), preset, processor).update(trained(processor, preset))
        assert (preset.compares_before, policy.scored) == (bool(passes), passes), weights


_BLIND = "objective.contrast=[{name: blind, context: no_image}]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.streams=[{name: answer, kl_coef: {from: 1, to: 0}}]"], r"kl_coef.steps=None.*given"),
        (["objective.streams=[{name: answer, kl_coef: {from: 1, to: -1, steps: 3}}]"], r"kl_coef.to=-1"),
        (["objective.streams=[{name: answer, kl_coef: {from: 1, to: 0, steps: 0}}]"], r"kl_coef.steps=0"),
        (["objective.streams=[{name: answer, kl_coef: {from: 1, to: 0, steps: 2.5}}]"], r"steps=2.5.*whole"),
        (["objective.streams=[{name: answer, kl_coef: {start: 1, to: 0, steps: 2}}]"], "start is no key of a schedule"),
        (
            ["objective.streams=[{name: answer, kl_coef: {from: 1, to: 0, steps: 2, shape: step}}]"],
            "shape='step'.*linear, cosine",
        ),
        (["objective.streams=[{name: answer, clip_low: {from: 1, to: 0, steps: 2}}]"], r"clip_low=\{"),
        (["objective.streams=[{name: answer, gate: accc}]"], "accc"),
        (
            [
                "objective.preset=gdpo",
                "objective.contrast=[{name: a}]",
                "objective.streams=[{name: answer, contrast: a, contrast_reward: 1}]",
            ],
            "per_component makes an advantage of each reward",
        ),
        (["objective.contrast=[blind]"], r"contrast\[0\]='blind'"),
        (["objective.contrast=[{context: no_image}]"], r"contrast\[0\].name=None"),
        (["objective.contrast=[{name: a, context: metadata}]"], r"\(a\).field=None.*given where context is metadata"),
        (["objective.contrast=[{name: a, context: noise, field: facts}]"], r"\(a\).field='facts'.*nowhere else"),
        (["objective.contrast=[{name: a, context: metadata, field: 3}]"], r"\(a\).field=3"),
        (["objective.contrast=[{name: _}]"], r"contrast\[0\].name='_'"),
        ([_BLIND, "objective.streams=[{name: answer, contrast: blind}]"], "makes nothing of it"),
        (["objective.contrast=[{name: a-b}]"], r"contrast\[0\].name='a-b'"),
        (["objective.contrast=[{name: a}, {name: a}]"], r"contrast\[1\].name='a'.*no other contrast"),
        (["objective.contrast=[{name: a, contxt: noise}]"], "contxt is no key of a contrast. Did you mean 'context'"),
        (["objective.contrast=[{name: a, context: dark}]"], r"\(a\).context='dark'.*no_image, masked"),
        (["objective.contrast=[{name: a, context: masked, share: 0}]"], r"\(a\).share=0.*greater than 0"),
        (["objective.contrast=[{name: a, context: masked, share: .nan}]"], r"\(a\).share=nan"),
        (["objective.contrast=[{name: a, share: 0.5}]"], r"\(a\).share=0.5.*left out where context is not masked"),
        (["objective.contrast=[{name: a, weights: start}]"], r"\(a\).weights='start'.*policy, reference"),
        ([_BLIND, "objective.streams=[{name: answer, token_share: 0}]"], r"\(answer\).token_share=0"),
        ([_BLIND, "objective.streams=[{name: answer, sequence_weight_low: 2}]"], r"sequence_weight_low=2"),
        ([_BLIND, "objective.streams=[{name: answer, contrast_coef: -1001}]"], r"contrast_coef=-1001"),
        ([_BLIND, "objective.streams=[{name: answer, token_weighting: most}]"], r"token_weighting='most'.*top"),
        ([_BLIND, "objective.streams=[{name: answer, contrast: 3}]"], r"contrast=3"),
        ([_BLIND, "objective.streams=[{name: answer, token_weighting: top}]"], "names no contrast that it is of"),
        (
            [_BLIND, "objective.streams=[{name: answer, contrast: blnd, contrast_reward: 1}]"],
            "'blnd' is not among.*which has blind",
        ),
        (
            [_BLIND, "objective.streams=[{name: answer, contrast: blind, token_share: 0.2}]"],
            "token_share=0.2, which belongs to token_weighting=top",
        ),
        (
            [_BLIND, "objective.streams=[{name: answer, contrast: blind, token_weighting: top, token_threshold: 0.2}]"],
            "token_threshold=0.2, which belongs to token_weighting=gated, and its token_weighting is top",
        ),
        ([_BLIND, "objective.streams=[{name: answer, token_threshold: -0.1}]"], r"token_threshold=-0.1.*at least 0"),
        ([_BLIND, "objective.streams=[{name: answer, token_threshold: .nan}]"], r"token_threshold=nan"),
        ([_BLIND, "objective.streams=[{name: answer, token_threshold: 11}]"], r"token_threshold=11.*at most 10"),
        (
            [_BLIND, "objective.streams=[{name: answer, contrast: blind, sequence_weight_for: consistent}]"],
            "sequence_weight_for=consistent, and no sequence_weight_low",
        ),
        (
            [_BLIND, "objective.streams=[{name: answer, sequence_weight_for: all}]"],
            "weight_for='all'.*dependent, consistent",
        ),
        ([_BLIND, "objective.streams=[{name: visual, contrast: blind, contrast_reward: 1}]"], "second pass sees none"),
        (
            [
                "objective.contrast=[{name: a, weights: reference}]",
                "objective.streams=[{name: answer, contrast: a, contrast_coef: 1}]",
            ],
            "its weights are the reference's",
        ),
        (
            ["objective.preset=vision_r1", "objective.contrast=[{name: told, context: description}]"],
            "the template 'cot' asks for none",
        ),
        (
            [
                _BLIND,
                "objective.loss=tests/own_loss.py:loss",
                "objective.streams=[{name: answer, contrast: blind, contrast_coef: 1}]",
            ],
            "contrast=blind is of our loss",
        ),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        preset_from_config(load_config(None, words).objective)


def test_a_contrast_of_the_start_keeps_it() -> None:
    plain = ["objective.kl_coef=0", "objective.contrast=[{name: a, weights: %s}]"]
    for weights, needs in (("policy", False), ("reference", True)):
        preset = preset_of(load_config(None, [plain[0], plain[1] % weights]))
        assert preset.needs_reference is needs and not preset.weighs_contrast
