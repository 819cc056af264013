"""Rewards over ranks, the summary's definitions, and the rollout file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.streams import PRESETS
from megatron_sr1.training.rollout_files import step_lines, write_rollouts
from megatron_sr1.training.step_metrics import summarise
from megatron_sr1.training.step_rewards import sample_rewards, scored_rewards, without_leaks
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair
from tests.step_cases import recorder, rollouts_of, scored

IMAGE = Image.new("RGB", (28, 28))
RIGHT_SECOND = r"<think> 3 + 7 = 10 </think> \boxed{10}"


def _pair(sample: int, description: str | None, answer: str, second: str | None) -> RolloutPair:
    def rollout(text: str, name: str) -> Rollout:
        return Rollout(f"0/p/{sample}/{name}", (1, 2), (3,), text, (-0.5,), "stop", 0)

    block = "" if description is None else f"<description> {description} </description> "
    first = rollout(block + rf"<think> t </think> \boxed{{{answer}}}", "first")
    return RolloutPair(sample, first, None if second is None else rollout(second, "second"), description)


@pytest.fixture
def groups() -> list[RolloutGroup]:
    """Four samples: right and faithful; a shortcut (right, but the description misleads); wrong; no description."""
    prompt = Prompt("p", "What is the sum of all digits?", "10", (IMAGE,), metadata={"facts": ["3", "7"]})
    pairs = (
        _pair(0, "The digits are 3 7 .", "10", RIGHT_SECOND),
        _pair(1, "The digits are 3 8 .", "10", r"<think> 3 + 8 = 11 </think> \boxed{11}"),
        _pair(2, "The digits are 3 7 .", "9", RIGHT_SECOND),
        _pair(3, None, "10", None),
    )
    return [RolloutGroup(0, prompt, pairs)]


def test_summary_follows_the_definitions(groups: list[RolloutGroup]) -> None:
    ledger = scored(groups, PRESETS["vision_sr1"])
    rewards = ledger.rollout_rewards
    assert rewards["acc"].tolist() == [1, 1, 0, 1]
    assert rewards["acc_vis"].tolist() == [1, 0, 1, 0]
    assert rewards["fmt"].tolist() == [1, 1, 1, 0]
    summary = summarise(ledger)
    assert summary["accuracy"] == 0.75
    assert summary["second_pass_accuracy"] == 0.5
    assert summary["language_shortcut_rate"] == 0.5, "samples 1 and 3: right, and the description alone is not enough"
    assert summary["faithful"] == 0.5
    assert summary["format"] == 0.75
    assert summary["leak"] == 0.0


def test_without_known_facts_faithfulness_is_not_measured(groups: list[RolloutGroup]) -> None:
    unknown = [RolloutGroup(0, Prompt("p", "q", "10", (IMAGE,)), groups[0].pairs)]
    assert summarise(scored(unknown, PRESETS["see_think"]))["faithful"] is None


def test_prompts_without_images_have_the_plain_layout_and_no_part_in_what_is_said_of_descriptions(
    groups: list[RolloutGroup],
) -> None:
    preset = PRESETS["vision_sr1"]
    plain = (_pair(0, None, "10", None), _pair(1, "The digits are 3 7 .", "10", None)) * 2
    both = [*groups, RolloutGroup(1, Prompt("t", "What is 3 + 7?", "10"), plain)]
    with closing(Graders(scored_rewards(preset))) as graders:
        for group in both:
            graders.submit(group)
        vectors = dict(graders.collect())
    made = recorder(preset, 4)
    ledger, _ = made.record(both, [sample_rewards(vectors[number], preset) for number in range(2)], ALONE)
    rewards = ledger.rollout_rewards
    fmt = [1, 1, 1, 0, 1, 0, 1, 0]
    assert rewards["fmt"].tolist() == fmt, "the plain layout, and a description where none is asked for"
    assert rewards["acc"].tolist() == [1, 1, 0, 1, 1, 1, 1, 1] and rewards["acc_vis"].tolist()[4:] == [0] * 4
    images_alone, summary = summarise(scored(groups, preset)), summarise(ledger)
    for name in ("second_pass_accuracy", "language_shortcut_rate", "leak"):
        assert summary[name] == images_alone[name]
    assert summary["accuracy"] == pytest.approx(7 / 8)
    text = summarise(ledger.of([1]))
    assert text["language_shortcut_rate"] is None and text["accuracy"] == 1.0


def test_the_leak_filter_takes_only_visual_rewards(groups: list[RolloutGroup]) -> None:
    rewards = {"acc": torch.ones(2), "acc_vis": torch.ones(2), "fmt_vis": torch.ones(2), "leak": torch.tensor([0.0, 1])}
    filtered = without_leaks(rewards, PRESETS["vision_sr1"])
    assert filtered["acc"].tolist() == [1, 1]
    assert filtered["acc_vis"].tolist() == filtered["fmt_vis"].tolist() == [1, 0]


def test_rollouts_are_kept_whole(groups: list[RolloutGroup], tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step_000000.jsonl"
    write_rollouts(path, rollouts_of(groups, None, PRESETS["vision_sr1"]), 1)
    lines = step_lines(path)
    assert len(lines) == 4
    assert lines[1]["rewards"]["acc_vis"] == 0.0 and lines[1]["rewards"]["acc"] == 1.0
    assert lines[0]["first"]["prompt_ids"] == [1, 2] and lines[0]["first"]["generator_logprobs"] == [-0.5]
    assert lines[3]["second"] is None and lines[3]["description"] is None
