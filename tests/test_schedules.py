"""Coefficients that change over the steps, and streams that another reward gates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest

from megatron_sr1.config import ObjectiveConfig, load_config
from megatron_sr1.policy import Policy
from megatron_sr1.processor import Processor
from megatron_sr1.streams import PRESETS, preset_from_config, preset_of
from megatron_sr1.training.batches import rollout_advantages
from megatron_sr1.training.live_groups import live_groups
from megatron_sr1.training.trainer import Trainer
from megatron_sr1.types import RewardStream, Schedule
from tests.step_cases import trained
from tests.test_trainer import Recorder as PolicyOfNobody


def test_schedules_by_hand() -> None:
    half = RewardStream(
        "a",
        "first",
        "response",
        (("acc", 1.0),),
        kl_coef=0.4,
        schedules=(Schedule("kl_coef", 0.4, 0.0, 4), Schedule("loss_weight", 0.0, 1.0, 4, "cosine")),
    )
    found = [(half.at(step).kl_coef, half.at(step).loss_weight) for step in (0, 1, 2, 4, 9)]
    quarter = 1 - 0.5 * (1 + math.cos(math.pi / 4))
    for pair, expected in zip(found, [(0.4, 0.0), (0.3, quarter), (0.2, 0.5), (0.0, 1.0), (0.0, 1.0)], strict=True):
        assert pair == pytest.approx(expected, abs=1e-12)


def test_a_schedule_is_what_a_run_needs_at_some_step() -> None:
    """Its largest coefficient decides what is kept; a step's is the loss's."""
    annealed = "{name: answer, kl_coef: {from: 0.0, to: 0.2, steps: 10}}"
    preset = preset_of(load_config(None, ["objective.kl_coef=0", f"objective.streams=[{annealed}]"]))
    assert preset.needs_reference and preset.streams[0].kl_coef == 0.2
    assert [preset.at(step).streams[0].kl_coef for step in (0, 5, 10)] == pytest.approx([0.0, 0.1, 0.2])
    assert preset.at(5).streams[1] == preset.streams[1] and PRESETS["gdpo"].at(5) is PRESETS["gdpo"]


def test_the_trainer_takes_the_coefficients_of_the_step(tiny_model_dir: str) -> None:
    """At half of the way the KL costs half, and the metrics say so."""
    words = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=2", "objective.kl_coef=0"]
    stream = "{name: answer, kl_coef: {from: 0.4, to: 0.0, steps: 10}, loss_weight: 0}"
    config = load_config(None, [*words, "objective.preset=see_think", f"objective.streams=[{stream}]"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    losses: dict[int, float] = {}
    for step in (0, 5, 10):
        policy = Costing()
        rollouts = replace(trained(processor, preset), step=step)
        (result,) = Trainer(config, cast(Policy, policy), preset, processor).update(rollouts)
        assert result.metrics["schedule/answer/kl_coef"] == pytest.approx(0.4 - 0.04 * step, abs=1e-9)
        losses[step] = policy.loss
    assert losses[0] > 1e-4 and losses[5] == pytest.approx(losses[0] / 2, rel=1e-5) and losses[10] == 0.0


class Costing(PolicyOfNobody):
    """Adds up the losses of its last step."""

    loss = 0.0

    def __init__(self) -> None:
        super().__init__(0.0, 0.0)

    def train_step(self, batches: Any, loss_fn: Any, scoring: Any) -> Any:
        self.loss = sum(float(loss_fn(index, one)[0]) for index, one in enumerate(self._logprobs(batches)))
        return super().train_step(batches, loss_fn, scoring)


def test_a_gate_lets_only_those_learn_that_earn_another_reward(tiny_model_dir: str) -> None:
    """Rewards of the description within the groups 0 1 | 1 0; acc, the gate, is 1 0 | 1 0."""
    processor = Processor.from_pretrained(tiny_model_dir)
    stream = {"name": "told", "tokens": "description", "rewards": {"acc_vis": 1.0}, "advantage": "centred"}
    for gate, expected in (({}, [-0.5, 0.5, 0.5, -0.5]), ({"gate": "acc"}, [-0.5, 0.0, 0.5, 0.0])):
        objective = ObjectiveConfig(preset=None, streams=[{**stream, **gate}])
        preset = preset_from_config(objective)
        assert preset.rewards == ("acc_vis", *gate.values())
        ledger = trained(processor, preset).ledger
        found = rollout_advantages(ledger, ledger.rollout_rewards, preset, 1e-6)
        assert found.flatten().tolist() == pytest.approx(expected)
        assert ((found != 0).view(2, 2).any(1) == live_groups(ledger, preset, objective)[0][0]).all()


def test_a_kl_in_the_reward_may_be_annealed_to_nothing(tiny_model_dir: str) -> None:
    """What is taken off is that of the step's coefficient."""
    annealed = "{name: answer, kl_in: reward, kl_estimator: k1, kl_coef: {from: 0.4, to: 0.0, steps: 10}}"
    words = ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=2"]
    config = load_config(None, [*words, "objective.preset=see_think", f"objective.streams=[{annealed}]"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_of(config)
    taken = {}
    for step in (0, 5, 10):
        rollouts = replace(trained(processor, preset), step=step)
        (result,) = Trainer(config, cast(Policy, PolicyOfNobody(0.0, 0.0)), preset, processor).update(rollouts)
        taken[step] = result.metrics["loss/answer/kl_in_reward"]
    assert abs(taken[0]) > 1e-3 and taken[5] == pytest.approx(taken[0] / 2, rel=1e-6) and taken[10] == 0.0
