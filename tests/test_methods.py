"""Published methods that are shipped as files."""

from __future__ import annotations

from importlib.resources import files

import pytest

from megatron_sr1.config import load_config
from megatron_sr1.rollout.later import check_metadata
from megatron_sr1.streams import PRESETS, methods, preset_of
from megatron_sr1.types import LaterPass, Prompt


def test_methods_are_short_files_with_formula_and_paper() -> None:
    for name in methods.METHODS:
        text = files(methods).joinpath(f"{name}.yaml").read_text()
        assert (
            len(text.splitlines()) <= 25
            and ("arXiv 2" in text or "(CVPR 2026, https://" in text)
            and "#   L = " in text
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
