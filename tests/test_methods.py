"""Published methods that are shipped as files."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from megatron_sr1.config import load_config
from megatron_sr1.objective import stream_advantages
from megatron_sr1.rewards import score_group
from megatron_sr1.rollout.later import check_metadata
from megatron_sr1.streams import PRESETS, methods, preset_of
from megatron_sr1.types import SECOND, LaterPass, Prompt, Reading, Rollout, RolloutGroup, RolloutPair


def test_methods_are_short_files_with_formula_and_paper() -> None:
    for name in methods.METHODS:
        text = files(methods).joinpath(f"{name}.yaml").read_text()
        assert (
            len(text.splitlines()) <= 25 and ("arXiv 2" in text or "2026, https://" in text) and "#   L = " in text
        ), name
        assert PRESETS[name].name == name
    weights = [
        dict(
            preset_of(load_config(None, ["objective.preset=papo", f"objective.format_weight={alpha}"]))
            .streams[0]
            .rewards
        )
        for alpha in (0.1, 0.3)
    ]
    assert weights == [{"acc": 1.0, "fmt": 0.1}, {"acc": 1.0, "fmt": 0.3}]


def test_caprl_asks_its_reader_what_the_metadata_ask() -> None:
    """By the weights of the start, unless a pass of that name says otherwise."""
    reader = PRESETS["caprl"].later_pass("reader")
    assert reader == LaterPass("reader", question="questions", samples=4, reader="reference")
    assert reader in PRESETS["caprl"].passes.later
    entry = "objective.passes=[{name: reader, question: asked, samples: 2, reader: endpoint}]"
    changed = preset_of(load_config(None, ["objective.preset=caprl", entry]))
    assert changed.later_pass("reader") == LaterPass("reader", question="asked", samples=2, reader="endpoint")
    prompt = Prompt("p", "?", "1", metadata={})
    with pytest.raises(ValueError, match=r"sample 'p'.*metadata's 'questions'.*list of"):
        check_metadata(prompt, PRESETS["caprl"].passes.later)


def test_visionary_r1_anneals_its_kl() -> None:
    """Half of it at half of the way, by a cosine; the weights of the start are kept to the end."""
    preset = PRESETS["visionary_r1"]
    found = [preset.at(step).streams[0].kl_coef for step in (0, 100, 200, 900)]
    assert found == pytest.approx([0.04, 0.02, 0.0, 0.0], abs=1e-12) and preset.needs_reference


def test_a_method_is_changed_as_other_presets_are() -> None:
    """A contrast of its name takes the place of the preset's; others join; a stream changes by key."""
    words = ["objective.contrast=[{name: masked, context: no_image}, {name: more, context: noise}]"]
    changed = preset_of(
        load_config(None, ["objective.preset=papo", *words, "objective.streams=[{name: answer, contrast_coef: 0.5}]"])
    )
    assert [(one.name, one.context) for one in changed.contrasts] == [("masked", "no_image"), ("more", "noise")]
    assert (changed.streams[0].contrast_coef, changed.streams[0].contrast_entropy_coef) == (0.5, -0.03)


def test_a_method_s_weighting_can_be_taken_away() -> None:
    for kind in ("none", "proportional"):
        entry = f"objective.streams=[{{name: answer, token_weighting: {kind}}}]"
        assert preset_of(load_config(None, ["objective.preset=vppo", entry])).streams[0].token_weighting == kind


def test_weights_for_consistent_responses_can_be_taken_away() -> None:
    """By null, which leaves whom they would be for without a meaning."""
    entry = "objective.streams=[{name: answer, sequence_weight_low: null}]"
    answer = preset_of(load_config(None, ["objective.preset=cappo", entry])).streams[0]
    assert not answer.is_weighted and answer.contrast_coef == -0.01


def test_car_rewards_what_a_description_adds_to_the_question_alone() -> None:
    """It mends a wrong answer, changes nothing, spoils a right one, is not there: gains of 1, 0, -1 and -1, whose mean
    is -0.25 and whose spread the root of 2.75 / 3; each has the layout of the second pass but the last."""
    preset = PRESETS["car"]
    assert preset.later_pass("direct") == LaterPass("direct", context="nothing") and preset.second_pass
    assert preset.passes.later == (SECOND, LaterPass("direct", context="nothing"))

    def answer(value: str, name: str) -> Rollout:
        text = rf"<think> so </think> \boxed{{{value}}}"
        return Rollout(f"0/p/0/{name}", (1,), (2, 3), text, (-0.1, -0.2), "stop", 0)

    pairs = []
    for sample, (told, direct) in enumerate((("10", "9"), ("10", "10"), ("9", "10"), (None, "10"))):
        further = (Reading("direct", 0, answer(direct, "direct"), None),)
        second = None if told is None else answer(told, "second")
        pairs.append(RolloutPair(sample, answer("10", "first"), second, told and "3 7", further=further))
    caption = preset.streams[1]
    names = [name for name, _ in caption.rewards]
    vectors = score_group(RolloutGroup(0, Prompt("p", "Sum?", "10"), tuple(pairs)), names)
    rewards = {name: torch.tensor([vector[name] for vector in vectors], dtype=torch.float64) for name in names}
    assert (rewards["acc_vis"] - rewards["acc_vis@direct"]).tolist() == [1, 0, -1, -1]
    assert rewards["fmt_vis"].tolist() == [1, 1, 1, 0]
    centred = replace(caption, advantage="centred", rewards=caption.rewards[:2])
    found = stream_advantages(centred, rewards, torch.zeros(4, dtype=torch.int64), 1e-6)
    assert found.tolist() == [1.25, 0.25, -0.75, -0.75]
    scaled = stream_advantages(replace(centred, advantage="z_score"), rewards, torch.zeros(4, dtype=torch.int64), 1e-9)
    assert scaled.tolist() == pytest.approx([each / math.sqrt(2.75 / 3) for each in (1.25, 0.25, -0.75, -0.75)])
