"""What training measures of every token, beside the rollouts: as it is written, read back, refused and shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.training.ledger import slots_of
from megatron_sr1.training.rollout_files import remove_step, rollouts_file, steps_in
from megatron_sr1.training.token_files import (
    ResponseName,
    TokenMeasures,
    digest_of,
    read_tokens,
    remove_tokens,
)
from megatron_sr1.training.token_writer import TokenWriter
from megatron_sr1.training.trainer import Trainer
from megatron_sr1.types import LogProbs, MicroBatch
from tests.credit_cases import SavedRun, Saver
from tests.test_distorted_training import far
from tests.test_trainer import Recorder as PolicyOfNobody
from tests.test_viewer import look, samples_of

APART = 0.1  # nats, of trainer and generator
BOUND = "objective.max_logprob_gap=1000"


class Measured(PolicyOfNobody):
    """With the entropy of a token a thousandth of its id, so of every response its own. In a row without images that
    are not black, a token is less likely by a nat, and by one more a place."""

    def _logprobs(self, batches: Sequence[MicroBatch]) -> list[LogProbs]:
        found = []
        for batch, scores in zip(batches, super()._logprobs(batches), strict=True):
            black = all(int(image.patches().float().amax()) == 0 for image in batch.images)
            unlikely = (1.0 + batch.row_offset.float()) * (1.0 if black else 0.0)
            found.append(LogProbs(scores.logprobs - unlikely, 1e-3 * batch.targets.float()))
        return found


@pytest.fixture
def saver(tmp_path: Path, tiny_model_dir: str) -> Saver:
    return Saver(tmp_path / "run", tiny_model_dir)


def train(saver: Saver, run: SavedRun, policy: PolicyOfNobody, step: int = 0) -> dict[ResponseName, TokenMeasures]:
    """What a trainer of the run's step leaves of it."""
    folder = run.folder / "rollouts"
    writer = TokenWriter(folder, slots_of(run.preset), 0, 1, writes=True, removes=True)
    trainer = Trainer(run.config, cast(Policy, policy), run.preset, saver.processor, tokens=writer)
    trainer.update(replace(run.rollouts, step=step))
    return read_tokens(folder, step)


def responses(run: SavedRun) -> dict[ResponseName, Any]:
    """All that are trained."""
    found = {}
    for group in run.rollouts.groups:
        for number, pair in enumerate(group.pairs):
            found[ResponseName(group.group_id, number, "first", 0)] = pair.first
            if pair.second is not None:
                found[ResponseName(group.group_id, number, "second", 0)] = pair.second
    return found


# ---------------------------------------------------------------- what is written
@pytest.mark.parametrize("size", [2, 1])
def test_every_token_that_is_trained_has_its_gap_and_its_entropy(saver: Saver, size: int) -> None:
    """Of one optimizer step and of two. An update moves the policy by a nat, and no gap sees it."""
    run = saver.save(f"train.batch_size={size}", "train.micro_batch_tokens=256", BOUND)
    found = train(saver, run, Measured(1.0, APART))
    theirs = responses(run)
    assert found.keys() == theirs.keys() and len(theirs) == 7
    for name, rollout in theirs.items():
        own = found[name]
        assert own.ids == digest_of(rollout.response_ids) and own.values.keys() == {"gap", "entropy"}
        assert own.values["entropy"] == pytest.approx([1e-3 * token for token in rollout.response_ids], rel=1e-3)
        blind = name.pass_name != "first"
        expected = [APART - (1.0 + place if blind else 0.0) for place in range(len(rollout.response_ids))]
        assert own.values["gap"] == pytest.approx(expected, rel=1e-3)


def test_without_old_log_probs_the_gap_is_that_of_the_first_optimizer_step(saver: Saver) -> None:
    """Afterwards the trainer's are those of other weights."""
    run = saver.save("train.batch_size=1", "objective.old=generator", "train.micro_batch_tokens=256", BOUND)
    found = train(saver, run, Measured(1.0, APART))
    assert {name.group for name, one in found.items() if "gap" in one.values} == {0}
    assert {name.group for name, one in found.items() if "entropy" in one.values} == {0, 1}


def test_what_was_drawn_from_a_noisy_image_has_no_gap(saver: Saver) -> None:
    run = saver.save("objective.distorted={samples: 1, strength: 0.5}", BOUND)
    noisy = [replace(group, pairs=(group.pairs[0], far(group.pairs[1], True))) for group in run.rollouts.groups]
    run = saver.save("objective.distorted={samples: 1, strength: 0.5}", BOUND, groups=noisy)
    found = train(saver, run, Measured(0.0, APART))
    without = {name for name, one in found.items() if "gap" not in one.values}
    assert without == {ResponseName(group, 1, "first", 0) for group in (0, 1)}


def test_a_contrast_measures_how_far_each_token_depends_on_the_image(saver: Saver) -> None:
    run = saver.save(
        *("objective.preset=see_think", "objective.contrast=[{name: dark, context: masked, share: 1.0}]", BOUND),
        "objective.streams=[{name: answer, contrast: dark, contrast_coef: 0.01}]",
    )
    found = train(saver, run, Measured(0.0, APART))
    for name, rollout in responses(run).items():
        if name.pass_name == "first":
            values = found[name].values["dependency/dark"]
            assert values == pytest.approx([1.0 + place for place in range(len(rollout.response_ids))], rel=1e-3)
    shown, groups = look(run, saver.folder / "images")
    assert shown.measures["dependency/dark"] == "visual dependency, dark" and "dependency" not in shown.absent
    assert groups[0].samples[0].responses[0].measures["dependency/dark"][2] == pytest.approx(3.0, rel=1e-3)


def test_numbers_that_are_not_finite_or_very_large_are_kept_as_such(saver: Saver) -> None:
    class Broken(Measured):
        def train_step(self, batches: Any, loss_fn: Any, scoring: Any) -> StepResult:
            for index, one in enumerate(self._logprobs(batches)):
                one.logprobs[0], one.logprobs[1], one.logprobs[2] = math.nan, -math.inf, -1e6
                loss_fn(index, one)
            return StepResult({"logprob_gap": 0.0}, math.nan, 0.0, skipped=True)

    run = saver.save("train.micro_batch_tokens=4096", BOUND)
    found = train(saver, run, Broken(0.0, 0.0))
    gaps = next(one.values["gap"] for one in found.values() if not math.isfinite(one.values["gap"][0]))
    assert math.isnan(gaps[0]) and gaps[1] == -math.inf and gaps[2] == -65504.0
    _, groups = look(run, saver.folder / "images")
    assert sum("not_finite" in sample.filters for sample in samples_of(groups)) == 1


def test_a_gap_that_ends_the_run_can_be_looked_at(saver: Saver) -> None:
    run = saver.save("objective.max_logprob_gap=0.05")
    with pytest.raises(ValueError, match="differ by"):
        train(saver, run, PolicyOfNobody(0.0, 1.0))
    assert len(read_tokens(run.folder / "rollouts", 0)) == 7
    shown, groups = look(run, saver.folder / "images")
    assert "gap" not in shown.absent and all("gap" in sample.filters for sample in samples_of(groups))


# ---------------------------------------------------------------- parts
def test_each_replica_writes_its_own_part_and_others_nothing(saver: Saver) -> None:
    run = saver.save()
    folder, slots = run.folder / "rollouts", slots_of(run.preset)
    assert not read_tokens(folder, 0)
    train(saver, run, Measured(0.0, 0.0))
    (whole,) = folder.glob("*.npz")
    assert whole.name == "step_000000.tokens.0-of-1.npz"
    silent = TokenWriter(folder, slots, 0, 1, writes=False, removes=False)
    silent.begin(0)
    silent.write(0)
    assert [path.name for path in folder.glob("*.npz")] == [whole.name], "others leave it as it is"
    whole.rename(folder / "step_000000.tokens.1-of-2.npz")
    with pytest.raises(ValueError, match="some are missing"):
        read_tokens(folder, 0)
    TokenWriter(folder, slots, 0, 1, writes=False, removes=True).begin(0)
    assert not list(folder.glob("*.npz*")), "a layout of two replicas leaves nothing to one of one"


def test_a_replica_without_responses_has_a_part_nevertheless(saver: Saver) -> None:
    run = saver.save()
    found = train(saver, run, Measured(0.0, 0.0))
    folder = run.folder / "rollouts"
    (folder / "step_000000.tokens.0-of-1.npz").rename(folder / "step_000000.tokens.0-of-2.npz")
    TokenWriter(folder, slots_of(run.preset), 1, 2, writes=True, removes=False).write(0)
    assert read_tokens(folder, 0) == found and len(list(folder.glob("*.npz"))) == 2


def test_a_step_that_is_drawn_again_has_no_measures_of_the_old_one(saver: Saver) -> None:
    run = saver.save()
    folder = run.folder / "rollouts"
    train(saver, run, Measured(0.0, 0.0))
    train(saver, run, Measured(0.0, 0.0), step=10)
    (folder / "step_000000.tokens.0-of-1.npz.tmp").write_bytes(b"half")
    assert steps_in(folder) == [rollouts_file(folder, 0)], "they are no rollouts"
    remove_step(rollouts_file(folder, 0))
    remove_tokens(folder, 0)
    assert [path.name for path in folder.iterdir()] == ["step_000010.tokens.0-of-1.npz"]


# ---------------------------------------------------------------- what is shown
def test_measures_stand_beside_the_tokens(saver: Saver, tmp_path: Path) -> None:
    run = saver.save(BOUND, "train.micro_batch_tokens=256")  # rows of second passes alone, whose gaps are far over it
    found = train(saver, run, Measured(0.0, 0.5))
    shown, groups = look(run, tmp_path / "images")
    assert list(shown.measures) == ["gap", "entropy"] and shown.absent.keys() == {"dependency", "dropped"}
    assert "objective.contrast" in shown.absent["dependency"]
    for group in groups:
        for sample in group.samples:
            for one in sample.responses:
                name = ResponseName(group.number, sample.number, one.pass_name, one.number)
                assert one.measures == found[name].values and len(one.measures["gap"]) == len(one.tokens or ())
            apart = any(abs(value) >= math.log(2) for one in sample.responses for value in one.measures["gap"])
            assert ("gap" in sample.filters) == apart
    assert {"gap" in sample.filters for sample in samples_of(groups)} == {True, False}


def damaged(folder: Path) -> None:
    (file,) = folder.glob("*.npz")
    file.write_bytes(file.read_bytes()[:-200])


def too_few(folder: Path) -> None:
    """As if one column had lost its end."""
    (file,) = folder.glob("*.npz")
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, "ids": arrays["ids"][:-1]})


def of_another_kind(folder: Path) -> None:
    (file,) = folder.glob("*.npz")
    with file.open("wb") as out:
        np.save(out, np.zeros(3))


def twice(folder: Path) -> None:
    """As if the part of a replica had been copied over that of another."""
    (file,) = folder.glob("*.npz")
    for part in (0, 1):
        file.with_name(f"step_000000.tokens.{part}-of-2.npz").write_bytes(file.read_bytes())
    file.unlink()


def of_others(folder: Path) -> None:
    """As if the responses had been drawn again, and one had come out longer."""
    (file,) = folder.glob("*.npz")
    arrays = dict(np.load(file))
    arrays["ids"][0] += 1
    np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (damaged, "it is damaged"),
        (too_few, "it is damaged"),
        (of_another_kind, "it is damaged"),
        (twice, "responses of another part"),
        (of_others, "of two draws"),
    ],
)
def test_measures_that_do_not_fit_are_told_and_the_step_is_shown(
    saver: Saver, tmp_path: Path, change: Any, words: str
) -> None:
    run = saver.save(BOUND)
    train(saver, run, Measured(0.0, 0.0))
    change(run.folder / "rollouts")
    shown, groups = look(run, tmp_path / "images")
    assert all(words in shown.absent[name] for name in ("gap", "entropy", "dependency")) and not shown.measures
    assert not any(one.measures for sample in samples_of(groups) for one in sample.responses)
    assert len(samples_of(groups)) == 4


def test_a_step_that_was_not_trained_says_so(saver: Saver, tmp_path: Path) -> None:
    shown, _ = look(saver.save(), tmp_path / "images")
    assert shown.absent.keys() == {"gap", "entropy", "dependency", "dropped"}
    words = ("track.tokens=false or by an earlier release", "the files were removed", "logprob_gap")
    assert all(one in shown.absent["gap"] for one in words)
