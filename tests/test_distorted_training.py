"""Siblings that were drawn from noisy images, from the step's rollouts to the update: one group, clean images, and a
gap to the engine that is none of its errors."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from megatron_sr1.config import ConfigError, ObjectiveConfig, load_config
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.policy import Policy
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE
from megatron_sr1.rollout.request import Draw, Generation
from megatron_sr1.streams import PRESETS, preset_of
from megatron_sr1.training.batches import Batcher, rollout_advantages
from megatron_sr1.training.credit import step_credit
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_files import rollouts_file, step_files, write_rollouts
from megatron_sr1.training.saved_rollouts import SavedRollouts
from megatron_sr1.training.saved_step import SavedStep
from megatron_sr1.training.step_metrics import step_metrics
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.training.trainer import Trainer
from megatron_sr1.types import Distorted, Prompt
from tests.batch_cases import their_rewards, two_groups
from tests.data_cases import prompts
from tests.sampled_run import Answering, Runs
from tests.step_cases import Listed, recorder, rollouts_of, rows_of
from tests.test_trainer import Recorder as PolicyOfNobody
from tests.workspace import untimed

FAR = 3.0  # nats a token, that the engine says more of what it drew from noise
HALF = "objective.distorted={samples: 1, strength: 0.5}"
_STEP = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=2", "objective.kl_coef=0")


def mixed(processor: Processor, preset: Any, *, flagged: bool = True) -> StepRollouts:
    """The two groups of `batch_cases`; the second sample of each saw noise, and its engine is far from the trainer."""
    groups = [replace(group, pairs=(group.pairs[0], far(group.pairs[1], flagged))) for group in two_groups(processor)]
    return rollouts_of(groups, their_rewards(), preset, Recorder.of(preset, 2, processor, "train"))


def far(pair: Any, flagged: bool) -> Any:
    first = pair.first
    logprobs = tuple(value + FAR for value in first.generator_logprobs)
    return replace(pair, first=replace(first, generator_logprobs=logprobs), distorted=flagged)


def stepped(folder: str, *settings: str, flagged: bool = True, start: float = 0.001) -> dict[str, float]:
    """Metrics of a step of a trainer that is `start` nats from the engine wherever both see the same."""
    config = load_config(None, [*_STEP, "objective.preset=vision_sr1", HALF, *settings])
    processor, preset = Processor.from_pretrained(folder), preset_of(config)
    trainer = Trainer(config, cast(Policy, PolicyOfNobody(0.0, start)), preset, processor)
    return trainer.update(mixed(processor, preset, flagged=flagged))[0].metrics


def test_all_siblings_are_one_group() -> None:
    """Rewards 1.1 0.1 | 1.1 0.0, noise for the second of each: mean and spread are of both."""
    preset = PRESETS["see_think"]
    ledger = rollouts_of(small_groups(), their_rewards(), preset).ledger
    assert ledger.distorted.tolist() == [[False, True], [False, True]]
    found = rollout_advantages(ledger, ledger.rollout_rewards, preset, 1e-9)
    assert found.flatten().tolist() == pytest.approx([2**-0.5, -(2**-0.5)] * 2)


def small_groups() -> list[Any]:
    from tests.test_saved_rollouts import groups

    return [
        replace(group, pairs=tuple(replace(pair, distorted=pair.sample_index == 1) for pair in group.pairs))
        for group in groups(2)
    ]


# ---------------------------------------------------------------- the update
def test_training_sees_the_images_themselves(tiny_model_dir: str) -> None:
    """Every tensor of the rows is that of responses that were drawn from them, pixels included."""
    config = load_config(None, [*_STEP, "objective.preset=vision_sr1", HALF])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    batcher = Batcher(config, processor, ALONE)
    ours, theirs = (rows_of(batcher, mixed(processor, preset, flagged=flag), preset) for flag in (True, False))
    assert ours.num_compared < theirs.num_compared == theirs.num_tokens == ours.num_tokens
    encoded = [processor.encode_image(group.prompt.images[0]) for group in two_groups(processor)]
    pixels = {image.patches().numpy().tobytes() for image in encoded}
    for own, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
        assert {image.patches().numpy().tobytes() for image in own.images} <= pixels
        for name, value in vars(own).items():
            same = torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else True
            assert same, name
    assert len({id(image) for row in ours.micro_batches for image in row.images}) == 2, "siblings share one"


def test_the_gap_is_that_of_what_the_engine_saw_as_the_trainer_does(tiny_model_dir: str) -> None:
    """Second passes of descriptions from noise among it: their prompt is a text."""
    metrics = stepped(tiny_model_dir)
    kinds = {name: value for name, value in metrics.items() if name.startswith("mismatch/")}
    assert metrics["logprob_gap"] == pytest.approx(0.001, rel=1e-3) and len(kinds) == 3
    assert all(value == pytest.approx(0.001, rel=1e-3) for value in kinds.values()), kinds
    with pytest.raises(ValueError, match="the log-probs of trainer and engine differ"):
        stepped(tiny_model_dir, flagged=False)


def test_a_second_pass_of_a_distorted_sibling_is_compared(tiny_model_dir: str) -> None:
    processor = Processor.from_pretrained(tiny_model_dir)
    config = load_config(None, [*_STEP, "objective.preset=vision_sr1", HALF])
    preset = preset_of(config)
    rollouts = mixed(processor, preset)
    rows, ledger = rows_of(Batcher(config, processor, ALONE), rollouts, preset), rollouts.ledger
    of_firsts = int(ledger.response_tokens[:, 1, 0].sum())
    assert rows.num_tokens - rows.num_compared == of_firsts > 0
    assert sum(int((~tokens.compared).sum()) for tokens in rows.tokens) == of_firsts
    assert int(ledger.of_kind[..., :3].sum()) == rows.num_compared, "kinds count the same tokens"


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_what_corrects_for_the_engine_leaves_noise_alone(tiny_model_dir: str, kind: str, level: str) -> None:
    """Weights of e^0.001 a token where both saw the same, and 1 for what was drawn from noise: none is bounded."""
    plain = stepped(tiny_model_dir, "objective.advantage=centred")
    how = (f"objective.mismatch={kind}", f"objective.mismatch_level={level}", "objective.advantage=centred")
    found = stepped(tiny_model_dir, *how)
    assert found["mismatch/bounded"] == 0 and 1 < found["mismatch/weight"] < 1.2
    assert found["logprob_gap"] == pytest.approx(plain["logprob_gap"])
    unflagged = stepped(tiny_model_dir, *how, "objective.max_logprob_gap=9", flagged=False)
    assert unflagged["mismatch/weight"] < 0.8, "what drew from noise would hardly count"
    answer = "loss/answer/policy"
    assert abs(found[answer] - plain[answer]) < 0.02 < abs(unflagged[answer] - plain[answer])


def test_saved_rollouts_keep_their_old_log_probs_the_trainer_s(tiny_model_dir: str) -> None:
    """Though the configuration that they are trained with has no such siblings."""
    config = load_config(None, [*_STEP, "objective.preset=vision_sr1", "objective.old=generator"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    assert preset.distorted is None
    trainer = Trainer(config, cast(Policy, PolicyOfNobody(0.0, 0.0)), preset, processor)
    with pytest.raises(ConfigError, match=r"objective\.old='generator' .* trainer where siblings"):
        trainer.update(mixed(processor, preset))


# ---------------------------------------------------------------- what a step reports
def test_both_kinds_of_siblings_stand_beside_each_other() -> None:
    """acc 1 0 | 1 0, and 0.1 of the layouts 1 1 | 1 0; a third prompt without images is no part of it."""
    preset = replace(PRESETS["see_think"], distorted=Distorted(1, 0.25))
    rewards = {"acc": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]), "fmt": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])}
    first, second = small_groups()
    third = replace(first, group_id=2, prompt=Prompt("t", "?", "1"))
    third = replace(third, pairs=tuple(replace(pair, distorted=False) for pair in third.pairs))
    rollouts = rollouts_of([first, second, third], rewards, preset)
    clock = Clock()
    with clock("rollout"):
        pass
    found = step_metrics(rollouts, preset, ObjectiveConfig(), [], clock)
    assert found["schedule/distorted/strength"] == 0.25
    assert [found[f"siblings/{kind}/accuracy"] for kind in ("clean", "distorted")] == [1.0, 0.0]
    assert [found[f"siblings/{kind}/reward"] for kind in ("clean", "distorted")] == pytest.approx([1.1, 0.05])
    lengths = [[len(pair.first.response_ids) for pair in group.pairs] for group in (first, second)]
    for sample, kind in enumerate(("clean", "distorted")):
        expected = sum(each[sample] for each in lengths) / 2
        assert found[f"siblings/{kind}/response_tokens"] == expected
    assert found["accuracy"] == pytest.approx(4 / 6), "of all that was drawn"
    assert not [name for name in step_metrics(
        rollouts_of([third], None, PRESETS["see_think"]), PRESETS["see_think"], ObjectiveConfig(), [], clock
    ) if name.startswith(("siblings/", "schedule/"))]  # fmt: skip


# ---------------------------------------------------------------- files
def test_files_say_which_siblings_saw_noise_and_old_ones_that_none_did(tmp_path: Path) -> None:
    preset, made = PRESETS["vision_sr1"], small_groups()
    write_rollouts(rollouts_file(tmp_path, 0), rollouts_of(made, None, preset), 2)

    def taken() -> StepRollouts:
        return SavedRollouts(tmp_path, recorder(preset, 2), ALONE).take(Listed.of(made), 0, Clock())

    assert taken().groups == made and taken().ledger.distorted.tolist() == [[False, True]] * 2
    (path,) = step_files(rollouts_file(tmp_path, 0))
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    assert [line.pop("distorted", None) for line in lines] == [None, True, None, True]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    assert not taken().ledger.distorted.any()


def test_credit_is_that_of_the_group_whatever_its_samples_saw(tiny_model_dir: str, tmp_path: Path) -> None:
    config = load_config(None, [*_STEP, "objective.preset=see_think", HALF])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    found = []
    for name, flagged in (("noisy", True), ("clean", False)):
        write_rollouts(rollouts_file(tmp_path / name, 0), mixed(processor, preset, flagged=flagged), 2, preset.asked)
        step = SavedStep.read(tmp_path / name, 0, processor.image_token_id)
        found.append(step_credit(step.recorded(preset, processor, "train"), preset, config))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 4
    assert all(torch.equal(credit, found[1][key]) for key, credit in found[0].items())


# ---------------------------------------------------------------- whole runs
class Seeing(Answering):
    """What it answers hangs on every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, int] = {}

    def prepare(self, prompt_ids: Sequence[int], images: Sequence[Any]) -> object:
        pixels = b"".join(image.patches().numpy().tobytes() for image in images)
        self._image = hashlib.sha256(pixels).digest()[0]
        return super().prepare(prompt_ids, images)

    def add(self, request_id: str, prepared: Any, draw: Draw) -> None:
        super().add(request_id, prepared, draw)
        self.draws[request_id] = replace(draw, seed=draw.seed + self._image)


class Killed(Seeing):
    """Ends the run at one of its steps of decoding."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self._left = call

    def step(self) -> list[Generation]:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        return super().step()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Of prompts with a picture each, but for every third."""
    picture = Image.new("RGB", (84, 28), (90, 120, 40))
    data = [replace(one, images=(picture,) if index % 3 else ()) for index, one in enumerate(prompts(40))]
    return Runs(tmp_path, monkeypatch, data, how={"distorted": Distorted(1, 0.5)})


def test_a_run_that_is_killed_goes_on_to_the_bit_and_its_files_are_the_run(runs: Runs) -> None:
    whole = runs.go("whole", engine=Seeing())
    counts = []
    for step in range(6):
        lines = runs.lines("whole", step)
        shown = [sum(token == 2 for token in line["first"]["prompt_ids"]) > 0 for line in lines]
        assert [line.get("distorted", False) for line in lines] == [
            seen and line["sample"] == 1 for seen, line in zip(shown, lines, strict=True)
        ]
        counts.append(sum(shown))
    assert min(counts) < 8 and max(counts) > 0
    with pytest.raises(KeyboardInterrupt):
        runs.go("killed", engine=Killed(3 * 8 + 5))
    assert max(runs.kept["killed"]) == 2
    assert runs.go("killed", engine=Seeing()).number == whole.number
    assert [untimed_lines(runs, "killed", step) for step in range(6)] == [
        untimed_lines(runs, "whole", step) for step in range(6)
    ]
    replayed = runs.go("replayed", saved="whole")
    assert replayed.number == whole.number and replayed.trained == whole.trained
    assert untimed(runs.metrics("replayed")) == untimed(runs.metrics("whole"))
    clean = runs.go("clean", engine=Seeing(), how={})
    assert clean.number != whole.number, "noise is seen"


def untimed_lines(runs: Runs, name: str, step: int) -> list[dict[str, Any]]:
    lines = runs.lines(name, step)
    for line in lines:
        for clock in ("queued_at", "finished_at"):
            line["first"].pop(clock)
    return lines
