"""Passes that follow the first: what they earn, and what of them is trained and measured."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.config import Config, JudgeConfig, ObjectiveConfig, RewardsConfig
from megatron_sr1.evaluation import digest_of
from megatron_sr1.loops.evaluate import _identity
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards import Ungraded, find_reward, score_group
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.training.batches import rollout_advantages
from megatron_sr1.training.rollout_files import read_text, rollouts_file, step_files, write_rollouts
from megatron_sr1.training.rollout_reader import read_rollouts
from megatron_sr1.training.segments import scored_responses
from megatron_sr1.training.step_metrics import step_metrics
from megatron_sr1.training.step_rewards import sample_rewards, scored_rewards, without_leaks
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Prompt, Question, Reading, Rollout, RolloutGroup, RolloutPair
from tests.pass_cases import SEEN_IMAGE, bare, live, preset
from tests.scripted_engine import SEEN
from tests.step_cases import Listed, recorder, rollouts_of, scored


# ---------------------------------------------------------------- what is earned, and trained
def rollout(text: str, name: str = "first") -> Rollout:
    return Rollout(f"0/p/0/{name}", (1,), (2, 3), text, (-0.1, -0.2), "stop", 0)


def read(name: str, answer: str, number: int = 0, question: Question | None = None) -> Reading:
    return Reading(name, number, rollout(rf"<think> </think> \boxed{{{answer}}}", name), "3 7", question)


def answered(*seconds: str, blind: str = "10", description: str | None = "3 7", more: str = "7") -> RolloutPair:
    """`seconds`: the answers of the second pass' samples."""
    first = rollout(SEEN.format("3 7"))
    further = [read("second", answer, number) for number, answer in enumerate(seconds) if number]
    further += [
        read("blind", blind),
        read("more", more, 0, Question("Red?", "7")),
        read("more", "B", 1, Question("W", "A")),
    ]
    second = read("second", seconds[0]).rollout if seconds else None
    return RolloutPair(0, first, second, description, further=tuple(further))


def test_a_reward_of_a_later_pass_is_of_each_sample_and_of_the_question_it_was_asked() -> None:
    group = RolloutGroup(0, Prompt("p", "Sum?", "10"), (answered("10", "9"), answered(blind="9", description=None)))
    names = ["acc_vis", "acc_vis@blind", "acc_vis@more", "fmt_vis@blind", "leak"]
    vectors = score_group(group, names)
    assert vectors[0] == {"acc_vis": (1.0, 0.0), "acc_vis@blind": 1.0, "acc_vis@more": (1.0, 0.0),
                          "fmt_vis@blind": 1.0, "leak": 0.0}  # fmt: skip
    assert vectors[1]["acc_vis"] == () and vectors[1]["acc_vis@blind"] == 0.0
    assert find_reward("acc_vis@blind").shown == "acc_vis.blind"


def test_a_user_s_reward_looks_at_the_pass_it_is_aimed_at(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from megatron_sr1.rewards import Reward\n"
        "def f(pair, prompt):\n    return len(pair.second.response_text) + 100 * len(prompt.answer)\n"
        "def g(group):\n    return [0.0 if pair.second is None else 1.0 for pair in group.pairs]\n"
        "long = Reward(f, of_pass='second')\nthere = Reward(g, of_pass='second', needs=('group',))\n"
    )
    long, there = f"{tmp_path}/mine.py:long@more", f"{tmp_path}/mine.py:there@blind"
    pair = answered("10")
    bare = replace(pair, further=())
    group = RolloutGroup(0, Prompt("p", "Sum?", "10"), (pair, bare))
    with closing(Graders(["acc", long, there], num_workers=1)) as graders:
        graders.submit(group)
        ((_, vectors),) = graders.collect()
    assert not isinstance(vectors, Ungraded), vectors
    assert vectors[0][long] == tuple(len(r.rollout.response_text) + 100.0 for r in pair.readings("more"))
    assert (vectors[0][there], vectors[1][there], vectors[1][long]) == (1.0, 0.0, ())


def test_advantages_of_a_pass_with_samples_compare_all_of_them_and_the_first_pass_earns_their_mean() -> None:
    """Against the formula, written out: a z-score over the K * m answers of a group."""
    streams = [
        {"name": "visual", "pass": "second", "rewards": {"acc_vis": 1.0, "acc": 0.5}},
        {"name": "answer", "rewards": {"acc": 1.0, "acc_vis": 2.0}},
    ]
    objective = preset({"name": "second", "samples": 2}, streams=streams)
    pairs = [answered("10", "9"), answered("10", "10"), answered()]
    groups = [
        RolloutGroup(
            number,
            Prompt(f"p{number}", "Sum?", "10", SEEN_IMAGE),
            tuple(replace(p, sample_index=i) for i, p in enumerate(ps)),
        )
        for number, ps in enumerate((pairs, pairs[:1] * 3))
    ]
    ledger = scored(groups, objective)
    rewards = ledger.rollout_rewards
    assert rewards["acc_vis"].tolist() == [[1, 0], [1, 1], [0, 0], [1, 0], [1, 0], [1, 0]]
    found = rollout_advantages(ledger, rewards, objective, 1e-6)
    assert found.shape == (2, 6, 2)

    def z(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return [(value - mean) / (std + 1e-6) for value in values]

    names = [stream.name for stream in objective.streams]
    seen = found[names.index("visual")].flatten(1)
    acc = rewards["acc"].tolist()
    by_answer = [value + 0.5 * acc[b] for b, row in enumerate(rewards["acc_vis"].tolist()) for value in row]
    expected = torch.tensor([*z(by_answer[:6]), *z(by_answer[6:])]).view(6, 2)
    torch.testing.assert_close(seen, expected, atol=1e-6, rtol=1e-6)
    by_pair = [acc[b] + 2.0 * sum(row) / 2 for b, row in enumerate(rewards["acc_vis"].tolist())]
    first = found[names.index("answer")]
    torch.testing.assert_close(first[:3, 0], torch.tensor(z(by_pair[:3])), atol=1e-6, rtol=1e-6)
    assert not first[:, 1].any() and not first[3:].any()


def test_prompts_that_are_not_asked_a_pass_are_not_among_those_it_is_compared_with() -> None:
    """Scope batch, three prompts without images beside one with: the same advantages as alone."""
    objective = preset(advantage_scope="batch")
    with_image = RolloutGroup(0, Prompt("p", "Sum?", "10", SEEN_IMAGE), (answered("10"), answered("9")))
    plain = [RolloutGroup(n, Prompt(f"t{n}", "Sum?", "10"), (answered(), answered())) for n in (1, 2, 3)]
    names = [stream.name for stream in objective.streams]

    def visual(*groups: RolloutGroup) -> torch.Tensor:
        ledger = scored(groups, objective)
        return rollout_advantages(ledger, ledger.rollout_rewards, objective, 1e-6)[names.index("visual")]

    alone, both = visual(with_image), visual(with_image, *plain)
    assert torch.equal(both[:2], alone) and alone.any() and not both[2:].any() and not visual(*plain).any()


def test_a_function_of_spans_sees_the_question_that_was_asked() -> None:
    streams = [{"name": "v", "pass": "more", "rewards": {"acc_vis@more": 1.0}}]
    objective = preset({"name": "more", "question": "others", "samples": 2}, streams=streams)
    found = scored_responses(answered("10"), Prompt("p", "Sum?", "10", SEEN_IMAGE), objective)
    asked = [(one.pass_name, one.number, one.prompt.problem, one.prompt.answer) for one in found]
    assert ("first", 0, "Sum?", "10") in asked
    assert [one for one in asked if one[0] == "more"] == [("more", 0, "Red?", "7"), ("more", 1, "W", "A")]


def test_rollouts_of_other_passes_are_not_trained_on(tmp_path: Path) -> None:
    made = [RolloutGroup(0, Prompt("p", "Sum?", "10"), (answered("10"),))]
    path = rollouts_file(tmp_path, 0)
    then, now = preset({"name": "blind", "context": "nothing"}), preset({"name": "second", "samples": 2})
    write_rollouts(path, rollouts_of(made, {}, then), 1, then.asked, then.passes.later)

    def read(by: Any) -> Any:
        return read_rollouts(path, lambda further: Listed.of(made), 1, ["acc"], by.asked, by.passes.later)

    assert read(then).groups == made and read(preset()).groups == made, "a pass more does no harm"
    for other, name in ((now, "second"), (preset({"name": "blind", "context": "metadata", "field": "x"}), "blind")):
        with pytest.raises(ValueError, match=f"the pass '{name}' was another one, or none"):
            read(other)
    (file,) = step_files(path)
    path.write_text(read_text(file).replace('"passes"', '"other"'))
    file.unlink()
    assert read(now).groups == made, "of an earlier release"


def test_a_judge_s_reward_asks_once_whatever_the_second_pass_is_asked() -> None:
    asked: list[str] = []
    group = RolloutGroup(0, Prompt("p", "Sum?", "10"), (answered("10", "9"),))
    vectors = score_group(group, ["acc_judge"], ask=lambda text: asked.append(text) or r"\boxed{10}")
    assert vectors == [{"acc_judge": (1.0, 1.0)}] and len(asked) == 1


def test_the_leak_filter_takes_what_a_description_gives_away_and_nothing_else() -> None:
    passes = [
        {"name": "blind", "context": "nothing"},
        {"name": "more", "question": "others"},
        {"name": "start", "reader": "reference"},
    ]
    objective = preset({"name": "second", "samples": 2}, *passes)
    names = ("acc", "acc_vis@blind", "acc_vis@more", "acc_vis@start")
    rewards = {name: torch.ones(2) for name in names} | {"acc_vis": torch.ones(2, 2), "leak": torch.tensor([0.0, 1.0])}
    filtered = without_leaks(rewards, objective)
    assert filtered["acc_vis"].tolist() == [[1, 1], [0, 0]] and filtered["acc_vis@start"].tolist() == [1, 0]
    assert all(filtered[name].tolist() == [1, 1] for name in ("acc", "acc_vis@blind", "acc_vis@more"))


def test_a_cut_answer_of_an_endpoint_is_graded_as_it_is(tmp_path: Path) -> None:
    _, _, taken, metrics = live(tmp_path, lambda question, attempt: "cut" if "0/0/first" in question else r"\boxed{1}")
    assert (
        taken.ledger.rollout_rewards["acc_vis@big"].tolist() == [0.0, 1.0, 1.0, 1.0] and metrics["big/missing"] == 0.0
    )


def test_a_pass_is_measured_over_the_prompts_that_are_asked_it() -> None:
    objective = preset(
        {"name": "second", "enabled": False}, {"name": "blind", "context": "nothing"}, preset="see_think"
    )
    groups = [
        RolloutGroup(number, Prompt(f"p{number}", "Sum?", "10", SEEN_IMAGE if number == 0 else ()), pairs)
        for number, pairs in enumerate([(answered("10"), answered(blind="9"))] + [(answered(), answered())] * 3)
    ]
    vectors = [
        score_group(group if group.prompt.images else replace(group, pairs=bare(group)), scored_rewards(objective))
        for group in groups
    ]
    clock = Clock()
    with clock("rollout"):
        pass
    rewards = [sample_rewards(vector, objective) for vector in vectors]
    ledger, _ = recorder(objective, 2).record(groups, rewards, ALONE)
    taken = StepRollouts(ledger, Listed.of(groups), range(4), groups, {})
    metrics = step_metrics(taken, objective, ObjectiveConfig(), [], clock)
    assert metrics["reward/acc_vis.blind"] == 0.5 and metrics["blind/missing"] == 0.0
    assert not {"reward/acc_vis", "second_pass_accuracy", "second/missing"} & metrics.keys()


def test_an_evaluation_is_of_its_readers() -> None:
    class Data:
        fingerprint = "f"

    def identity(passes: list[dict[str, Any]], **judge: Any) -> dict[str, Any]:
        settings = JudgeConfig(**{"url": "http://127.0.0.1:1/v1", "model": "m", **judge})
        config = Config(objective=ObjectiveConfig(passes=passes), rewards=RewardsConfig(judge=settings))
        return dict(_identity(config, Data(), "weights"))  # type: ignore[arg-type]

    big = [{"name": "big", "reader": "endpoint"}]
    found = [identity(big), identity(big, model="n"), identity(big, parameters={"temperature": 1.0}), identity([])]
    assert len({digest_of(each) for each in found}) == 4
    assert identity([]) == identity([], model="n"), "whom nobody asks makes no difference"
    assert "the passes" not in identity([])
