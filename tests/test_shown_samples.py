"""Which samples of a step trackers are shown, and that they are what was asked, answered and earned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_sr1.config import ConfigError, SamplesConfig, load_config
from megatron_sr1.processor import Processor
from megatron_sr1.streams import PRESETS
from megatron_sr1.training.shown_samples import SamplePicker
from megatron_sr1.training.step_rollouts import StepRollouts
from tests.step_cases import trained


@pytest.fixture(scope="module")
def step(tiny_model_dir: str) -> StepRollouts:
    """Two groups of two samples, of one prompt with an image and one without a description."""
    return trained(Processor.from_pretrained(tiny_model_dir), PRESETS["vision_sr1"])


def shown(picker: SamplePicker, rollouts: StepRollouts, steps: Sequence[int]) -> list[int]:
    return [len(picker.pick(replace(rollouts, step=number))) for number in steps]


def test_samples_come_every_so_many_steps_and_are_owed_where_no_group_is_held(step: StepRollouts) -> None:
    assert shown(SamplePicker(SamplesConfig(every=3, count=1)), step, range(7)) == [1, 0, 0, 1, 0, 0, 1]
    assert shown(SamplePicker(SamplesConfig()), step, range(4)) == [0] * 4
    assert shown(SamplePicker(SamplesConfig(every=1, count=9)), step, [5]) == [2], "no more than there are"
    picker, elsewhere = SamplePicker(SamplesConfig(every=3, count=2)), replace(step, groups=[])
    assert shown(picker, elsewhere, [0, 1]) == [0, 0] and shown(picker, step, [2, 3, 4]) == [2, 2, 0]


def test_a_row_is_what_was_asked_answered_and_earned(step: StepRollouts) -> None:
    picker = SamplePicker(SamplesConfig(every=1, count=2))
    for number in range(2):  # another sample of each group in each turn
        for place, (row, group) in enumerate(zip(picker.pick(replace(step, step=number)), step.groups, strict=True)):
            pair, prompt = group.pairs[number], group.prompt
            assert (row.key, row.question, row.answer) == (prompt.key, prompt.problem, prompt.answer)
            assert row.first == pair.first.response_text and row.description == (pair.description or "")
            assert row.second == ("" if pair.second is None else pair.second.response_text)
            assert [image.size for image in row.opened()] == [image.size for image in prompt.images]
            assert row.rewards["acc"] == step.ledger.rewards["acc"][place, number]
            assert set(row.rewards) >= {"acc", "fmt", "format"}
    first: Any = step.ledger.rewards["acc"].clone()
    first[0, 0] = torch.nan
    unknown = replace(step, ledger=replace(step.ledger, rewards={**step.ledger.rewards, "acc": first}))
    assert "acc" not in picker.pick(replace(unknown, step=2))[0].rewards, "what nobody knows is left out"


@pytest.mark.parametrize("words", ["track.samples.every=-1", "track.samples.count=0"])
def test_what_is_no_number_of_samples_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=words.partition("=")[0]):
        load_config(None, [words])
