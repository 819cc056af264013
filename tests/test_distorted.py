"""Siblings that are drawn from noisy images: which, how noisy, and what the engine is given."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_sr1.config import ConfigError, ObjectiveConfig, load_config
from megatron_sr1.config.distorted import KEYS
from megatron_sr1.loops.answering import evaluation_sampling
from megatron_sr1.loops.generation import training_sampling
from megatron_sr1.processor import Processor
from megatron_sr1.rollout.balance import expected_tokens
from megatron_sr1.rollout.distortion import kept_signal, noisy, num_noise_steps
from megatron_sr1.rollout.request import Draw
from megatron_sr1.rollout.seeds import request_seed
from megatron_sr1.streams import PRESETS, check_siblings, preset_from_config, preset_of
from megatron_sr1.types import Distorted, RolloutGroup, Sampling, Schedule
from tests.scripted_engine import PATCHES, Letters, ScriptedEngine, dealt, generator, known, prompt, sampling, whole
from tests.test_pool import answered
from tests.test_two_pass import FailingEngine
from tests.thread_ranks import Meeting
from tests.workspace import REPOSITORY

HALF = Distorted(2, 0.5)
K = 4


class Looking(ScriptedEngine):
    """Notes what each request is shown."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shown: dict[str, list[Tensor]] = {}

    def prepare(self, prompt_ids: Sequence[int], images: Sequence[Any]) -> object:
        assert all(image.grid_thw == (1, 2, 6) for image in images)
        self._images = [image.patches() for image in images]
        return super().prepare(prompt_ids, images)

    def add(self, request_id: str, prepared: Any, draw: Draw) -> None:
        self.shown[request_id] = self._images
        super().add(request_id, prepared, draw)


def how(**changes: Any) -> Sampling:
    return sampling(**({"num_samples": K, "distorted": HALF} | changes))


def drawn(key: str, step: int = 0, number: int = 0, draw: int = 0, strength: float = 0.5) -> Tensor:
    """What the formula makes of the only picture of these tests."""
    seed = request_seed(1, step, key, draw, f"noise of image {number}")
    return noisy(PATCHES.byte(), num_noise_steps(strength), 1, 1, lambda: torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- how noisy
def test_the_paper_s_schedule_by_hand() -> None:
    """500 steps of noise, lambda = 30, t_max = 60, gamma = 40: at 40 a half, at 20 all but e^-10 of it."""
    strength = Distorted(6, Schedule("strength", 0.5, 0.0, 60, "sigmoid"))
    for step, expected in ((40, 250.0), (20, 500 / (1 + math.exp(-10))), (50, 500 / (1 + math.exp(5))), (60, 0.0)):
        assert 1000 * strength.at(step) == pytest.approx(expected, rel=1e-12)
    assert [num_noise_steps(strength.at(step)) for step in (0, 40, 50, 59, 60, 900)] == [500, 250, 3, 0, 0, 0]
    other = Schedule("x", 1.0, 3.0, 10, "sigmoid", slope=2.0, middle=0.5)
    assert [other.at(step) for step in (5, 10)] == [2.0, 3.0]
    assert other.at(0) == pytest.approx(3 - 2 / (1 + math.exp(-1)))
    assert Distorted(1, 0.25).at(7) == 0.25


def test_the_noise_is_that_of_diffusion() -> None:
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    expected = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    assert [kept_signal(n) for n in (0, 1, 250, 500, 1000)] == pytest.approx(expected[[0, 1, 250, 500, 1000]].tolist())
    assert kept_signal(500) == pytest.approx(0.74667, abs=1e-5), "noise of half a grey scale's standard deviation"


@pytest.mark.parametrize("num_steps", [100, 500])
def test_a_noisy_image_is_a_picture_on_the_same_grid(num_steps: int) -> None:
    """Middle grey: the mean and spread of the formula; one noise for all frames, one of its own for each channel."""
    patches = torch.full((512, 3 * 2 * 196), 128, dtype=torch.uint8)

    def drawn(seed: int) -> Tensor:
        return noisy(patches, num_steps, 3, 2, lambda: torch.Generator().manual_seed(seed))

    found = drawn(1)
    assert found.shape == patches.shape and found.dtype == torch.uint8 and torch.equal(found, drawn(1))
    assert not torch.equal(found, drawn(2))
    frames = found.unflatten(1, (3, 2, 196))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1]) and not torch.equal(frames[:, 0], frames[:, 1])
    signal, spread = kept_signal(num_steps), math.sqrt(1 - kept_signal(num_steps))
    values = found.double() / 255
    inside = torch.distributions.Normal(math.sqrt(signal) * 128 / 255, spread)
    expected = inside.sample((200_000,)).clamp(0, 1)
    assert values.mean() == pytest.approx(expected.mean().item(), abs=5e-3)
    assert values.std() == pytest.approx(expected.std().item(), abs=5e-3)


def test_the_processor_makes_another_image_of_the_same_normalisation(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    image = processor.encode_image(Image.new("RGB", (56, 28), (9, 90, 200)))
    before = image.patches().clone()
    other = processor.changed(image, lambda patches: 255 - patches)
    other.patches.start()
    assert torch.equal(other.patches(), 255 - before) and torch.equal(image.patches(), before)
    assert (other.grid_thw, other.normalisation) == (image.grid_thw, image.normalisation)
    frames = before.unflatten(1, (3, processor.num_frames, -1))
    assert processor.num_frames == 2 and torch.equal(frames[:, :, 0], frames[:, :, 1]), "channels, frames, pixels"


# ---------------------------------------------------------------- which, and what the engine sees
def test_the_last_siblings_see_one_noisy_copy_and_a_prompt_without_images_has_none() -> None:
    engine = Looking()
    groups = generator(engine).generate(whole([prompt("a", 2), prompt("t", 0), prompt("b")]), how(), 3)
    flags = [[pair.distorted for pair in group.pairs] for group in groups]
    assert flags == [[False, False, True, True], [False] * 4, [False, False, True, True]]
    for group, key, num_images in ((0, "a", 2), (2, "b", 1)):
        noise = [drawn(key, 3, number) for number in range(num_images)]
        for sample in range(K):
            shown = engine.shown[f"{group}/{sample}/first"]
            expected = noise if sample > 1 else [PATCHES.byte()] * num_images
            assert len(shown) == num_images
            assert all(torch.equal(*both) for both in zip(shown, expected, strict=True))
            assert engine.shown[f"{group}/{sample}/second"] == [], "a description is read as ever"
    assert not torch.equal(drawn("a", 3, 0), drawn("a", 3, 1)) and not torch.equal(drawn("a", 3), drawn("b", 3))
    first = groups[0].pairs
    assert len({pair.first.prompt_ids for pair in first}) == 1, "one prompt, in ids"
    assert engine.log.count("prepare") == 2 + 1 + 2 + 2 * K, "the copy once for all that see it"


def test_the_siblings_that_see_clean_images_are_those_of_a_run_without_noise() -> None:
    with_noise, without = Looking(), Looking()
    generator(with_noise).generate(whole([prompt("a"), prompt("b")]), how(), 0)
    generator(without).generate(whole([prompt("a"), prompt("b")]), how(distorted=None), 0)
    assert with_noise.draws == without.draws
    assert all(torch.equal(*shown) for name in ("0/1/first", "1/0/first") for shown in zip(
        with_noise.shown[name], without.shown[name], strict=True
    ))  # fmt: skip


def test_noise_is_drawn_anew_for_each_step_and_each_draw_of_a_prompt() -> None:
    engine = Looking()
    ours = generator(engine)
    found = []
    for step in (0, 1, 0):
        ours.generate(whole([prompt("a"), prompt("a")]), how(), step)
        found.append([engine.shown[f"{group}/3/first"][0] for group in (0, 1)])
    assert torch.equal(found[0][0], drawn("a", 0, 0, 0)) and torch.equal(found[0][1], drawn("a", 0, 0, K))
    assert torch.equal(found[1][0], drawn("a", 1)) and not torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(*pair) for pair in zip(found[0], found[2], strict=True)), "a step that is done again"


def test_where_the_strength_has_gone_to_0_every_sibling_is_clean() -> None:
    annealed = Distorted(2, Schedule("strength", 0.5, 0.0, 4))
    for step, strength in ((0, 0.5), (2, 0.25), (4, 0.0), (9, 0.0)):
        engine = Looking()
        (group,) = generator(engine).generate(whole([prompt("a")]), how(distorted=annealed), step)
        assert [pair.distorted for pair in group.pairs] == [False, False, strength > 0, strength > 0]
        expected = drawn("a", step, strength=strength) if strength else PATCHES.byte()
        assert torch.equal(engine.shown["0/3/first"][0], expected)


@pytest.mark.parametrize("streamed", [True, False])
def test_an_engine_that_fails_sees_the_same_again(streamed: bool) -> None:
    class Failing(Looking, FailingEngine): ...

    healthy, failing = Looking(), Failing(2, 5, error=RuntimeError("late"))
    prompts = whole([prompt("a"), prompt("b")])
    groups = [
        generator(engine, weights=dict, streamed=streamed).generate(prompts, how(), 0) for engine in (healthy, failing)
    ]
    assert groups[0] == groups[1] and failing.log.count("restart") == 2
    same_pixels(healthy.shown, failing.shown)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_neither_siblings_nor_pixels_hang_on_the_number_of_engines(num_ranks: int) -> None:
    """Dealt out to them, or taken by turns as slots get free; a key comes twice."""
    prompts, meeting = [prompt(f"p{i % 5}", num_images=i % 3) for i in range(7)], Meeting(num_ranks)
    alone = Looking()
    expected = generator(alone).generate(whole(prompts), how(), 2)

    def one(rank: int) -> list[RolloutGroup]:
        made = generator(engines[rank], engines=meeting.of(rank), weights=dict)
        return made.generate(dealt(prompts, how(), meeting.of(rank)), how(), 2)

    engines = [Looking() for _ in range(num_ranks)]
    with ThreadPoolExecutor(num_ranks) as pool:
        check_together(list(pool.map(one, range(num_ranks))), engines, expected, alone)
    engines = [Looking() for _ in range(num_ranks)]
    by_step = answered(prompts, engines, how(), slots=3, steps=3)
    check_together([steps[2] for steps in by_step], engines, expected, alone)


def check_together(
    shares: list[list[RolloutGroup]], engines: list[Looking], expected: list[RolloutGroup], alone: Looking
) -> None:
    groups = sorted((group for share in shares for group in share), key=lambda group: group.group_id)
    flags = [[[pair.distorted for pair in group.pairs] for group in each] for each in (groups, expected)]
    assert flags[0] == flags[1] and any(map(any, flags[0]))
    assert [group.pairs for group in groups] == [group.pairs for group in expected]
    shown: dict[str, list[Tensor]] = {}
    for engine, share in zip(engines, shares, strict=True):
        own = {str(group.group_id) for group in share}
        shown |= {name: images for name, images in engine.shown.items() if name.split("/")[0] in own}
    same_pixels(shown, alone.shown)


def same_pixels(ours: dict[str, list[Tensor]], theirs: dict[str, list[Tensor]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, images in ours.items():
        assert all(torch.equal(*pair) for pair in zip(images, theirs[name], strict=True)), name


def test_a_prompt_that_is_seen_twice_costs_an_engine_twice() -> None:
    letters: Any = Letters()
    counts = [
        [expected_tokens(letters, known(prompt("a", num_images=n)), how(distorted=one)) for one in (None, HALF)]
        for n in (1, 0)
    ]
    assert counts[0][1] - counts[0][0] == 3 + 2 and counts[1][1] == counts[1][0]


# ---------------------------------------------------------------- the configuration
def test_the_preset_is_the_paper_s_and_changes_by_key() -> None:
    preset = PRESETS["noisy_rollout"]
    assert preset.distorted == Distorted(4, Schedule("strength", 0.5, 0.0, 200, "sigmoid", 30.0, 2 / 3))
    assert PRESETS["vision_r1"].distorted is None and preset.streams == PRESETS["vision_r1"].streams
    changed = preset_from_config(ObjectiveConfig(preset="noisy_rollout", distorted={"samples": 6}))
    assert changed.distorted == Distorted(6, preset.distorted.strength)
    words = "objective.distorted={strength: {from: 0.4, to: 0.1, steps: 9, shape: sigmoid, slope: 5, middle: 0.5}}"
    config = load_config(None, ["objective.preset=noisy_rollout", words])
    assert preset_of(config).distorted == Distorted(4, Schedule("strength", 0.4, 0.1, 9, "sigmoid", 5, 0.5))
    assert training_sampling(config, preset_of(config)).distorted == preset_of(config).distorted
    assert evaluation_sampling(config, preset_of(config)).distorted is None, "evaluations see what there is"
    stream = "objective.streams=[{name: answer, kl_coef: {from: 1, to: 0, steps: 8, shape: sigmoid, middle: 0.5}}]"
    (first, *_) = preset_of(load_config(None, [stream])).streams
    assert first.at(4).kl_coef == 0.5


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{samples: -1, strength: 0.5}", r"distorted\.samples=-1 .* at least 0 .*0 takes a preset's"),
        ("{samples: 2, strength: 0.0001}", r"distorted\.strength=0\.0001 .* at least 0\.001"),
        ("{samples: 2, strength: {from: 0, to: 0, steps: 9}}", r"distorted\.strength=.* 0\.001 or more once"),
        ("{samples: 1.5, strength: 0.5}", r"distorted\.samples=1\.5 .* a whole number"),
        ("{samples: 2}", r"distorted\.strength=None .* given.*Write \{samples: 4, strength: 0\.5\}"),
        ("{strength: 0.5}", r"distorted\.samples=None .* given"),
        ("{samples: 2, strength: 1.5}", r"distorted\.strength=1\.5 .* at most 1"),
        ("{samples: 2, strength: 0}", r"distorted\.strength=0 .* at least 0\.001"),
        ("{samples: 2, strenght: 0.5}", r"distorted\.strenght is no key .*Did you mean 'strength'"),
        ("{samples: 2, strength: {from: 2, to: 0, steps: 9}}", r"strength\.from=2 .* at most 1"),
        ("{samples: 2, strength: {from: 1, to: 0}}", r"strength\.steps=None .* given"),
        ("{samples: 2, strength: {from: 1, to: 0, steps: 9, slope: 3}}", r"strength\.slope=3 .* left out"),
    ],
)
def test_what_cannot_be_is_refused(written: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"objective\.(distorted\.)?{words}"):
        preset_of(load_config(None, [f"objective.distorted={written}"]))


def test_a_presets_siblings_can_be_taken_away() -> None:
    preset = preset_of(load_config(None, ["objective.preset=noisy_rollout", "objective.distorted={samples: 0}"]))
    assert preset.distorted is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("rollout.samples_per_prompt=4",),
            r"distorted\.samples=4 .* less than rollout\.samples_per_prompt=4",
        ),
        (("objective.old=generator",), r"old='generator' .* trainer where siblings .* noisy images"),
        (("objective.old=none",), r"old='none' .* trainer"),
    ],
)
def test_a_run_that_cannot_have_such_siblings_is_refused(settings: tuple[str, ...], words: str) -> None:
    config = load_config(None, ["objective.preset=noisy_rollout", *settings])
    for check in (lambda: check_siblings(preset_of(config).distorted, config), lambda: training_sampling(
        config, preset_of(config)
    )):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            check()
    check_siblings(None, config)


def test_the_page_on_algorithms_has_every_key() -> None:
    page = (REPOSITORY / "docs" / "algorithms.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page.partition("## Distorted siblings")[2], re.MULTILINE)
    assert tuple(rows) == KEYS
