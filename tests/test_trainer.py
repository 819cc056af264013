"""A rollout batch cut into several optimizer steps: what is of the whole batch, and of the weights that drew it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from megatron_sr1.config import ConfigError, load_config
from megatron_sr1.config.checks import check_train_batch
from megatron_sr1.policy import Policy, StepResult
from megatron_sr1.processor import Processor
from megatron_sr1.ranks import ALONE
from megatron_sr1.streams import preset_from_config
from megatron_sr1.training.live_groups import live_groups
from megatron_sr1.training.logprob_gap import check_logprob_gap, max_logprob_gap
from megatron_sr1.training.trainer import Trainer
from megatron_sr1.types import LogProbs, LossFn, MicroBatch, Scoring
from tests.batch_cases import two_groups
from tests.step_cases import trained


class Recorder:
    """Log-probs as told: the generator's and `start` nats, and with each optimizer step `moves` nats more."""

    skips = False
    replicas = ALONE
    platform = SimpleNamespace(on_cpu=True, device=torch.device("cpu"), ranks=ALONE)

    def __init__(self, moves: float, start: float) -> None:
        self.moves = moves
        self.moved = start
        self.scored = 0  # passes without a gradient

    def return_to_device(self) -> None: ...

    def logprobs(self, batches: Sequence[MicroBatch], scoring: Scoring) -> list[LogProbs]:
        self.scored += 1
        return self._logprobs(batches)

    def _logprobs(self, batches: Sequence[MicroBatch]) -> list[LogProbs]:
        values = [-0.01 * batch.row_offset.float() + self.moved for batch in batches]
        return [LogProbs(value, torch.zeros_like(value)) for value in values]

    def reference_logprobs(self, batches: Sequence[MicroBatch], scoring: Scoring) -> list[LogProbs]:
        """Its distance to the generator's is the target's id in thousandths of a nat, so of every response its own."""
        values = [-0.01 * batch.row_offset.float() - 1e-3 * batch.targets.float() for batch in batches]
        return [LogProbs(value, torch.zeros_like(value)) for value in values]

    def train_step(self, batches: Sequence[MicroBatch], loss_fn: LossFn, scoring: Scoring) -> StepResult:
        metrics: dict[str, float] = {}
        for index, logprobs in enumerate(self._logprobs(batches)):
            for name, value in loss_fn(index, logprobs)[1].items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        self.moved += self.moves
        return StepResult(metrics, grad_norm=0.0, learning_rate=0.0, skipped=self.skips)


def _metrics(
    tiny_model_dir: str, moves: float, *overrides: str, start: float = 0.0, size: int = 1
) -> list[dict[str, float]]:
    """Of the two optimizer steps, or one of two prompts, on a batch of two prompts."""
    batch = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", f"train.batch_size={size}")
    config = load_config(None, [*batch, "train.micro_batch_tokens=256", *overrides])
    processor = Processor.from_pretrained(tiny_model_dir)
    preset, recorder = preset_from_config(config.objective), Recorder(moves, start)
    trainer = Trainer(config, cast(Policy, recorder), preset, processor)
    results = trainer.update(trained(processor, preset))
    return [{**result.metrics, "scored": recorder.scored} for result in results]


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_the_batch_of_an_advantage_is_the_rollout_batch(tiny_model_dir: str, scope: str) -> None:
    """Eq. 6 over all four rollouts with torch's own statistics; each optimizer step sees its half of the scores."""
    settings = (f"objective.advantage_scope={scope}", "objective.aggregation=sequence_mean", "objective.kl_coef=0")
    steps = _metrics(tiny_model_dir, 0.0, *settings)
    rewards = torch.tensor([[1.1, 0.1], [1.1, 0.0]])  # acc + 0.1 fmt of two groups of two
    over = {"batch": (0, 1), "group": (1,)}[scope]
    scores = (rewards - rewards.mean(over, keepdim=True)) / rewards.std(over, keepdim=True)
    losses = [step["loss/answer/policy"] for step in steps]
    assert losses == pytest.approx((-scores.mean(1)).tolist(), rel=1e-4, abs=1e-6)


def _summed_kl(processor: Processor) -> torch.Tensor:
    """[2, 2]: of each first pass of the two groups to the recorder's reference."""
    pairs = [pair for group in two_groups(processor) for pair in group.pairs]
    return torch.tensor([1e-3 * sum(pair.first.response_ids) for pair in pairs], dtype=torch.float64).view(2, 2)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("scope", ["batch", "group"])
def test_a_kl_in_the_reward_is_of_the_weights_that_drew_the_whole_batch(
    tiny_model_dir: str, scope: str, size: int
) -> None:
    """Updates move the policy by a nat a token in between, and no KL sees it: eq. 6 of rewards less beta KL, written
    out. One optimizer step or two, the advantages are the same."""
    settings = (f"objective.advantage_scope={scope}", "objective.aggregation=sequence_mean", "objective.clip_high=9")
    kl_settings = ("objective.kl_in=reward", "objective.kl_estimator=k1", "objective.kl_coef=0.5")
    steps = _metrics(tiny_model_dir, 1.0, *settings, *kl_settings, size=size)
    kl = 0.5 * _summed_kl(Processor.from_pretrained(tiny_model_dir))
    rewards = torch.tensor([[1.1, 0.1], [1.1, 0.0]]) - kl
    over = {"batch": (0, 1), "group": (1,)}[scope]
    scores = (rewards - rewards.mean(over, keepdim=True)) / rewards.std(over, keepdim=True)
    assert kl.std() > 0.1, "it matters"
    expected = -scores.mean(1) if size == 1 else -scores.mean()[None]
    expected = expected * torch.tensor([1.0, torch.e])[: len(expected)]  # the ratio after one update
    if scope == "batch" and size == 1:
        assert abs(expected[0]) > 0.1, "a half of the batch has a mean of its own"
    assert [step["loss/answer/policy"] for step in steps] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    taken = kl.mean(1) if size == 1 else kl.mean()[None]
    assert [step["loss/answer/kl_in_reward"] for step in steps] == pytest.approx(taken.tolist(), rel=1e-5)


def test_each_stream_takes_the_kl_of_its_own_tokens_or_none(tiny_model_dir: str) -> None:
    """The visual stream credits second passes, of which one is missing; the answer stream's KL is in its loss."""
    visual = "{name: visual, kl_in: reward, kl_estimator: k1, kl_coef: 0.5}"
    (step,) = _metrics(tiny_model_dir, 0.0, f"objective.streams=[{visual}]", "objective.advantage=centred", size=2)
    groups = two_groups(Processor.from_pretrained(tiny_model_dir))
    seconds = [pair.second for group in groups for pair in group.pairs if pair.second is not None]
    total = sum(1e-3 * token for second in seconds for token in second.response_ids)
    assert len(seconds) == 3 and step["loss/visual/kl_in_reward"] == pytest.approx(0.5 * total / 4, rel=1e-6)
    assert "loss/answer/kl_in_reward" not in step and step["loss/answer/kl"] > 0


def test_the_gap_to_the_generator_leaves_the_updates_out(tiny_model_dir: str) -> None:
    """The log-probs of the weights that drew the tokens are the generator's here, and an update moves them by a nat."""
    first, second = _metrics(tiny_model_dir, 1.0, "objective.kl_coef=0")
    assert second["loss/answer/ratio_mean"] == pytest.approx(torch.e, rel=1e-5), "the second step is off-policy"
    for step in (first, second):
        gaps = {name: value for name, value in step.items() if name == "logprob_gap" or name.startswith("mismatch/")}
        assert len(gaps) >= 3 and max(gaps.values()) < 1e-7


OLD = ("objective.kl_coef=0", "objective.clip_high=9", "objective.clip_low=1")


def test_the_generator_s_log_probs_stand_for_a_pass_of_the_trainer(tiny_model_dir: str) -> None:
    """Where both are the same, so is everything; where they differ, by 0.1 nats here, every ratio has the gap."""
    ours = _metrics(tiny_model_dir, 1.0, *OLD)
    theirs = _metrics(tiny_model_dir, 1.0, *OLD, "objective.old=generator")
    assert [step.pop("scored") for step in ours] == [2, 2] and [step.pop("scored") for step in theirs] == [0, 0]
    assert theirs[0] == pytest.approx(ours[0], abs=1e-7)
    gaps = {name for name in ours[1] if name == "logprob_gap" or name.startswith("mismatch/")}
    assert len(gaps) >= 3 and ours[1].keys() - gaps == theirs[1].keys(), "an update is no gap"
    assert theirs[1] == pytest.approx({name: ours[1][name] for name in theirs[1]}, abs=1e-6)
    apart = _metrics(tiny_model_dir, 0.0, *OLD, "objective.old=generator", "objective.max_logprob_gap=1", start=0.1)
    for number, step in enumerate(apart):
        assert step["loss/answer/ratio_mean"] == pytest.approx(torch.tensor(0.1).exp().item(), rel=1e-5)
        assert step.get("logprob_gap") == (pytest.approx(0.1, rel=1e-4) if number == 0 else None)
    with pytest.raises(ValueError, match=r"differ by 0\.1 nats a token"):
        _metrics(tiny_model_dir, 0.0, *OLD, "objective.old=generator", start=0.1)


def test_without_old_log_probs_every_ratio_is_1_and_the_weights_correct(tiny_model_dir: str) -> None:
    """The second step is a nat off-policy: its weights are present over generator's probability, held at the bound."""
    settings = (*OLD, "objective.old=none", "objective.mismatch=truncate", "objective.mismatch_high=2")
    first, second = _metrics(tiny_model_dir, 1.0, *settings)
    for step in (first, second):
        assert step["scored"] == 0 and step["loss/answer/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert first["mismatch/weight"] == pytest.approx(1.0, abs=1e-6) and first["mismatch/bounded"] == 0.0
    assert second["mismatch/weight"] == pytest.approx(2.0) and second["mismatch/bounded"] == pytest.approx(1.0)
    plain = _metrics(tiny_model_dir, 1.0, *OLD)
    assert second["loss/answer/policy"] == pytest.approx(2 / torch.e * plain[1]["loss/answer/policy"], rel=1e-5)
    (once,) = _metrics(tiny_model_dir, 1.0, *OLD, "objective.old=none", size=2)
    assert once == _metrics(tiny_model_dir, 1.0, *OLD, size=2)[0], "one optimizer step has none in any case"


def test_a_kl_in_the_reward_without_a_pass_is_of_the_generator(tiny_model_dir: str) -> None:
    kl = ("objective.kl_in=reward", "objective.kl_estimator=k1", "objective.kl_coef=0.5", "objective.max_logprob_gap=9")
    for old, ours in (("trainer", 0.25), ("generator", 0.0), ("none", 0.0)):
        step = _metrics(tiny_model_dir, 0.0, *kl, f"objective.old={old}", start=0.25, size=2)[0]
        groups = two_groups(Processor.from_pretrained(tiny_model_dir))
        lengths = [len(pair.first.response_ids) for group in groups for pair in group.pairs]
        expected = 0.5 * (_summed_kl(Processor.from_pretrained(tiny_model_dir)).sum() + ours * sum(lengths)) / 4
        assert step["loss/answer/kl_in_reward"] == pytest.approx(float(expected), rel=1e-5), old


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("objective.old=generator", "objective.mismatch=mask"), "it must be none with objective.old=generator"),
        (("objective.old=none",), "several optimizer steps"),
    ],
)
def test_old_log_probs_that_nothing_corrects_for_are_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_train_batch(load_config(None, ["rollout.prompts_per_step=4", "train.batch_size=2", *settings]))


def test_a_step_whose_log_probs_are_too_far_apart_ends_the_run(tiny_model_dir: str) -> None:
    """By 0.005 nats here, everywhere; the message says where it is largest."""
    plain = "objective.kl_coef=0"
    assert _metrics(tiny_model_dir, 0.0, plain, start=0.005)[0]["logprob_gap"] == pytest.approx(0.005, rel=1e-3)
    bound = "objective.max_logprob_gap=0.004"
    with pytest.raises(
        ValueError, match=r"differ by 0.005 nats a token, and objective.max_logprob_gap is 0.004.* text 0.005"
    ):
        _metrics(tiny_model_dir, 0.0, plain, bound, start=0.005)
    with pytest.raises(ValueError, match=r"objective\.max_logprob_gap is 0\.01:"):
        _metrics(tiny_model_dir, 0.0, plain, start=0.02)


def test_the_bound_is_that_of_the_coarser_arithmetic() -> None:
    def bound(dtype: str, on_cpu: bool) -> float:
        return max_logprob_gap(load_config(None, [f"precision.dtype={dtype}"]), on_cpu)

    assert bound("fp32", True) < bound("fp32", False) == bound("bf16", True) == bound("bf16", False)


def test_the_gap_by_kind_says_where_to_look() -> None:
    metrics = {"logprob_gap": 0.3, "mismatch/text": 0.0, "mismatch/near_image": 0.5, "mismatch/position_0": 0.3}
    with pytest.raises(ValueError, match="largest is near_image, so look first at the pictures"):
        check_logprob_gap(metrics, 0.2)
    with pytest.raises(ValueError, match="nan nats a token"):
        check_logprob_gap(metrics | {"logprob_gap": float("nan")}, 0.2)
    check_logprob_gap(metrics, 0.3)


def test_a_skipped_step_names_the_samples_whose_log_probs_are_not_finite(tiny_model_dir: str) -> None:
    """One token's is none; that the gap of such a step is no number does not end the run."""
    batch = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=2")
    config = load_config(None, [*batch, "train.micro_batch_tokens=256", "objective.kl_coef=0"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_from_config(config.objective)
    rollouts = trained(processor, preset)

    class Spoilt(Recorder):
        skips = True

        def _logprobs(self, batches: Sequence[MicroBatch]) -> list[LogProbs]:
            found = super()._logprobs(batches)
            found[0].logprobs[0] = float("nan")
            return found

    trainer = Trainer(config, cast(Policy, Spoilt(0.0, 0.0)), preset, processor)
    (result,) = trainer.update(rollouts)
    (culprit,) = result.culprits
    assert culprit[0] in rollouts.prompts.keys and culprit[1] in (0, 1)
    assert Trainer(config, cast(Policy, Recorder(0.0, 0.0)), preset, processor).update(rollouts)[0].culprits == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_skips_all_steps_of_the_batch_and_names_the_sample(
    tiny_model_dir: str, value: float
) -> None:
    """It would enter the mean of its group, and with scope "batch" that of all: no loss is a number."""
    batch = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=1")
    config = load_config(None, [*batch, "train.micro_batch_tokens=256", "objective.kl_coef=0"])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_from_config(config.objective)
    rollouts = trained(processor, preset)
    equal = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # nothing else keeps the second group alive
    rewards = {name: each * equal for name, each in rollouts.ledger.rewards.items()}
    ledger = replace(rollouts.ledger, rewards=rewards)
    assert not live_groups(ledger, preset, config.objective)[0][:, 1].any()
    rewards["acc"][1, 0] = value
    rollouts = replace(rollouts, ledger=ledger)
    results = Trainer(config, cast(Policy, Recorder(0.0, 0.0)), preset, processor).update(rollouts)
    assert len(results) == 2 and all(math.isnan(result.metrics["loss/answer/policy"]) for result in results)
    key = rollouts.prompts.keys[1]
    assert [result.culprits for result in results] == [((key, 0),)] * 2
    assert rollouts.told_bad_rewards() == [f"the reward 'acc' gave {value} for response 0 to sample {key!r}"]
    alive, kept = live_groups(rollouts.ledger, preset, config.objective)
    assert kept[1] and alive[:, 1].all(), "it is not replaced in silence"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kl_in_the_reward_that_is_not_finite_skips_the_step_and_names_the_sample(
    tiny_model_dir: str, value: float
) -> None:
    """The reference gives one token of one sample no number: no loss of that rollout step is one, so nothing is stepped
    (tests/test_policy.py)."""
    settings = ("objective.kl_in=reward", "objective.kl_estimator=k1", "objective.kl_coef=0.5")
    batch = ("rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "train.batch_size=1")
    config = load_config(None, [*batch, "train.micro_batch_tokens=256", *settings])
    processor, preset = Processor.from_pretrained(tiny_model_dir), preset_from_config(config.objective)

    class Spoilt(Recorder):
        seen = 0

        def reference_logprobs(self, batches: Sequence[MicroBatch], scoring: Scoring) -> list[LogProbs]:
            found = super().reference_logprobs(batches, scoring)
            if not self.seen:
                found[0].logprobs[0] = value
            self.seen += 1
            return found

    found = {}
    for policy in (Recorder(0.0, 0.0), Spoilt(0.0, 0.0)):
        rollouts = trained(processor, preset)
        results = Trainer(config, cast(Policy, policy), preset, processor).update(rollouts)
        found[type(policy)] = [(result.metrics["loss/answer/policy"], result.culprits) for result in results]
    assert all(math.isfinite(loss) and not culprits for loss, culprits in found[Recorder])
    assert all(math.isnan(loss) for loss, _ in found[Spoilt]) and len(found[Spoilt]) == 2
    (first,), (second,) = (culprits for _, culprits in found[Spoilt])
    assert first == second and first[0] == rollouts.prompts.keys[0] and first[1] in (0, 1)
