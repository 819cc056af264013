"""Steps whose gradient is not finite: counted, told, written down, and ended when there are too many in a row."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sr1.config import ConfigError, ObjectiveConfig, RewardsConfig, load_config
from megatron_sr1.loops.run import Run
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.policy import StepResult
from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import preset_from_config
from megatron_sr1.training.bad_steps import BadSteps, not_finite
from megatron_sr1.training.live_groups import step_advantages
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.saved_rollouts import SavedRollouts
from megatron_sr1.types import LogProbs, Sampling
from tests.sampled_run import Runs, texts
from tests.step_cases import Listed, recorder
from tests.test_saved_rollouts import Handing, groups
from tests.thread_ranks import on_threads

GOOD = StepResult({}, 1.0, 1e-3)
BAD = StepResult({}, math.nan, 1e-3, skipped=True, culprits=(("b", 3), ("a", 1)))


def counted(folder: Path, most: int, in_a_row: int = 0) -> tuple[BadSteps, list[str]]:
    said: list[str] = []
    return BadSteps(most, in_a_row, folder, said.append, writes=True), said


def test_they_are_counted_in_a_row_told_and_written_down(tmp_path: Path) -> None:
    steps, said = counted(tmp_path, most=2)
    steps.take(0, [GOOD, GOOD])
    assert not said and not (tmp_path / "bad_steps").exists()
    steps.take(1, [GOOD, BAD])
    assert steps.in_a_row == 1
    (text,) = said
    assert (
        "step 2: the gradient is not finite, nor are rewards or log-probs of 2 samples; see " in text
        and "is skipped" in text
    )
    tree = json.loads((tmp_path / "bad_steps" / "step_000001.json").read_text())
    assert tree["not_finite"] == [{"key": "a", "sample": 1}, {"key": "b", "sample": 3}]
    assert (tree["step"], tree["grad_norms"], tree["skipped"]) == (1, ["1.0", "nan"], [False, True])
    steps.take(2, [StepResult({}, math.inf, 1e-3, skipped=True)])
    assert "log-probs" not in said[-1] and steps.in_a_row == 2
    steps.take(3, [])
    assert steps.in_a_row == 2, "a step that trains nothing says nothing"
    steps.take(4, [GOOD])
    assert steps.in_a_row == 0
    steps.take(5, [BAD], ["x", "y", "x"], ["the reward 'mine' gave nan for response 3 to sample 'b'"])
    assert said[-1].count("the reward 'mine' gave nan for response 3 to sample 'b'; see") == 1
    tree = json.loads((tmp_path / "bad_steps" / "step_000005.json").read_text())
    assert tree["batch"] == ["x", "y"] and tree["rewards"] == [
        "the reward 'mine' gave nan for response 3 to sample 'b'"
    ]


@pytest.mark.parametrize(("most", "before", "ends"), [(0, 0, True), (1, 0, False), (2, 2, True), (3, 2, False)])
def test_one_more_than_allowed_ends_the_run(tmp_path: Path, most: int, before: int, ends: bool) -> None:
    steps, _ = counted(tmp_path, most, before)
    if not ends:
        steps.take(7, [BAD])
        return
    with pytest.raises(
        ValueError, match=rf"in {before + 1} steps in a row, and train\.max_bad_steps is {most}"
    ) as error:
        steps.take(7, [BAD])
    assert "bad_steps/step_000007.json" in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "bad_steps" / "step_000007.json").is_file(), "the evidence is there before it ends"


def test_the_samples_whose_log_probs_are_not_finite_are_found_on_every_rank() -> None:
    def look(ranks: object) -> tuple[tuple[str, int], ...]:
        rank = ranks.rank  # type: ignore[attr-defined]
        values = torch.tensor([-0.1, math.nan if rank else -0.2, -math.inf, -1.0])
        places = [torch.tensor([4, 4 + 8 * rank, 9, 0])]
        return not_finite([LogProbs(values, None)], places, 2, ranks, lambda index: (f"k{index // 4}", index % 4))  # type: ignore[arg-type]

    heard = on_threads(2, look)
    assert heard[0] == heard[1] == (("k1", 0), ("k1", 2))
    assert not_finite([], [], 1, ALONE, lambda index: ("", index)) == ()


@pytest.mark.parametrize("value", ["-1", "1.5", "null"])
def test_a_limit_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.max_bad_steps"):
        load_config(None, [f"train.max_bad_steps={value}"])


# ---------------------------------------------------------------- in a run
def test_a_run_goes_on_over_bad_steps_and_a_restart_and_ends_at_one_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps, saved after every second one; two bad steps in a row are allowed."""
    runs = Runs(tmp_path, monkeypatch, texts(12), "train.max_bad_steps=2")
    plain = runs.go("plain")
    some = runs.go("some", bad=lambda step: step in (1, 2, 4))
    assert len(some.trained) == 6 and some.number != plain.number
    assert [entry["skipped_updates"] for entry in runs.metrics("some")] == [0, 1, 1, 0, 1, 0]
    assert [progress.bad_steps for _, progress in runs.kept["some"].values()] == [1, 0, 0]
    told = sorted((tmp_path / "some" / "bad_steps").iterdir())
    assert [path.name for path in told] == [f"step_00000{step}.json" for step in (1, 2, 4)]
    tree = json.loads(told[0].read_text())
    keys = list(dict.fromkeys(key for _, key in some.trained[1]))
    assert tree["batch"] == keys and tree["not_finite"] == [{"key": keys[0], "sample": 1}]

    with pytest.raises(ValueError, match=r"in 3 steps in a row, and train\.max_bad_steps is 2"):
        runs.go("ends", bad=lambda step: step >= 1)
    assert sorted(runs.kept["ends"]) == [2], "what was saved before stays"
    with pytest.raises(ValueError, match="in 3 steps in a row"):
        runs.go("ends", bad=lambda step: step >= 1)  # from step 2 on, the second of the row
    again = runs.go("ends", bad=lambda step: step == 1)
    assert len(again.trained) == 4 and max(runs.kept["ends"]) == 6


def test_the_checkpoint_that_is_being_written_is_finished_before_a_run_ends(tmp_path: Path) -> None:
    log: list[str] = []
    run: Any = SimpleNamespace(
        bad_steps=BadSteps(0, 0, tmp_path, log.append, writes=True),
        checkpoints=SimpleNamespace(settle=lambda: log.append("settle")),
    )
    Run.take_bad(run, 1, [GOOD], [])
    assert not log
    with pytest.raises(ValueError, match=r"train\.max_bad_steps is 0"):
        Run.take_bad(run, 2, [BAD], ["a"])
    assert log == ["settle"]


# ---------------------------------------------------------------- rewards
BAD_REWARD = """
def mine(pair, prompt):
    return float("nan") if prompt.key == "p1" and pair.sample_index else 1.0
"""


def test_a_reward_that_is_not_finite_stays_in_the_step_and_its_files_or_leaves_its_group_out(tmp_path: Path) -> None:
    """The trainer skips that step (test_trainer); before a first step, and in an evaluation, it is refused."""
    file = tmp_path / "bad.py"
    file.write_text(BAD_REWARD)
    name = f"{file}:mine"
    streams = f"objective.streams=[{{name: answer, rewards: {{{name}: 1}}}}]"
    preset = preset_from_config(load_config(None, [streams]).objective)
    sampling, made = Sampling(2, 1.0, 10, 0), groups(3)
    text = f"the reward {name!r} gave nan for response 1 to sample 'p1'"
    with LiveRollouts(Handing(made), sampling, recorder(preset, 2), RewardsConfig(), ALONE, tmp_path) as live:
        taken = live.take(Listed.of(made), 1, Clock())
        assert not taken.skipped and taken.told_bad_rewards() == [text]
        with pytest.raises(RewardError, match=re.escape(text)):
            live.look(Listed.of(made), 2)
    again = SavedRollouts(tmp_path, recorder(preset, 2), ALONE).take(Listed.of(made), 1, Clock())
    assert again.told_bad_rewards() == [text] and torch.isnan(again.ledger.rewards[name][1, 1])
    advantages = step_advantages(again.ledger, preset, ObjectiveConfig())
    assert advantages.isnan().all() and advantages.shape == (len(preset.streams), 6, 1)
    skips = RewardsConfig(on_error="skip_group")
    with LiveRollouts(Handing(made), sampling, recorder(preset, 2), skips, ALONE, tmp_path) as live:
        taken = live.take(Listed.of(made), 3, Clock())
    assert list(taken.skipped) == [1] and taken.skipped[1].startswith(text) and not taken.told_bad_rewards()
