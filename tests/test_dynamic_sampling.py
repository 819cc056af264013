"""Dynamic sampling: which groups are dead, what is drawn in their place, and that a run of it is one to the bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_sr1.config import Config, ConfigError, ObjectiveConfig, RewardsConfig, load_config
from megatron_sr1.data import Quarantine, SampleFeed, SampleStream, ShardDataset, StepPrompts, write_shards
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.policy import StepResult
from megatron_sr1.rewards import RewardError
from megatron_sr1.streams import PRESETS, Preset
from megatron_sr1.training import live_rollouts
from megatron_sr1.training.live_groups import live_groups, training_places
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.rollout_files import rollouts_file, step_files, step_lines
from megatron_sr1.training.rollout_reader import SavedPart, read_rollouts
from megatron_sr1.training.step_metrics import step_metrics
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Prompt, RewardStream, Rollout, RolloutGroup, RolloutPair
from tests.sampled_run import DRAWN, PRESET, RIGHT, SAMPLES, WRONG, Answering, Here, Runs, Spoiling, texts
from tests.scripted_engine import generator, sampling
from tests.step_cases import Listed, recorder, rollouts_of
from tests.thread_ranks import Meeting
from tests.workspace import untimed

WEIGHTS = {"acc": 1.0, "fmt": 0.5, "acc_vis": 2.0, "fmt_vis": 0.25}  # every sum is exact, and no two are the same


# ---------------------------------------------------------------- which groups are dead
def stream(name: str, rewards: Sequence[str], **changes: Any) -> RewardStream:
    weights = tuple((reward, WEIGHTS[reward]) for reward in rewards)
    return replace(RewardStream(name, "first", "response", weights), **changes)


def groups_of(num: int, size: int = 3) -> list[RolloutGroup]:
    first = Rollout("0/p/0/first", (1,), (2,), "t", (-0.1,), "stop", 0, 0.0, 1.0)
    pairs = tuple(RolloutPair(sample, first, None, None) for sample in range(size))
    return [RolloutGroup(3 * i, Prompt(f"p{i}", "?", "1"), pairs) for i in range(num)]


STREAMS = [
    stream("answer", ["acc", "fmt"]),
    stream("visual", ["acc_vis", "fmt_vis"], advantage="leave_one_out"),
    stream("both", ["acc", "acc_vis"], normalize="per_component", advantage="z_score"),
    stream("whole", ["acc", "fmt"], scope="batch"),
    stream("spread", ["fmt_vis"], advantage="batch_std"),
    stream("unweighted", ["fmt"], loss_weight=0.0),
]


def is_alive(one: RewardStream, rewards: dict[str, list[list[int]]], group: int, filtered: bool) -> bool:
    """By what the words say, in exact numbers."""

    def earned(name: str, g: int, sample: int) -> Fraction:
        visual = name.endswith("_vis") and filtered
        return Fraction(rewards[name][g][sample] * (1 - rewards["leak"][g][sample] if visual else 1))

    def total(g: int, sample: int) -> Fraction:
        return sum((Fraction(weight) * earned(name, g, sample) for name, weight in one.rewards), Fraction())

    samples, every = range(3), range(len(rewards["acc"]))
    if one.normalize == "per_component":
        return any(len({earned(name, group, sample) for sample in samples}) > 1 for name, _ in one.rewards)
    if one.scope == "batch":
        mean = sum((total(g, sample) for g in every for sample in samples), Fraction()) / (3 * len(every))
        return any(total(group, sample) != mean for sample in samples)
    return len({total(group, sample) for sample in samples}) > 1


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_group_lives_where_any_stream_with_a_weight_has_spread_in_it(data: Any) -> None:
    num = data.draw(st.integers(1, 4))
    bits = st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=num, max_size=num)
    table = {name: data.draw(bits) for name in (*WEIGHTS, "leak")}
    streams = data.draw(st.lists(st.sampled_from(STREAMS), min_size=1, max_size=3, unique_by=lambda s: s.name))
    filtered = data.draw(st.booleans())
    expected = [[is_alive(one, table, group, filtered) for group in range(num)] for one in streams]
    rewards = {name: torch.tensor(value).flatten().float() for name, value in table.items()}
    preset = Preset("mine", "see_think", tuple(streams))
    found, kept = live_groups(
        rollouts_of(groups_of(num), rewards, preset).ledger, preset, ObjectiveConfig(leak_filter=filtered)
    )
    assert found.tolist() == expected
    weighted = [row for row, one in zip(expected, streams, strict=True) if one.loss_weight]
    assert kept.tolist() == [any(row[group] for row in weighted) for group in range(num)]


def test_components_that_cancel_leave_nothing_to_learn() -> None:
    """As the trainer has it: their advantages are 0."""
    rewards = {"acc": torch.tensor([1.0, 0.0, 0.0, 0.0]), "fmt": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    one = replace(stream("s", ["acc"]), rewards=(("acc", 1.0), ("fmt", 1.0)), normalize="per_component")
    preset = Preset("mine", "see_think", (one,))
    alive, _ = live_groups(rollouts_of(groups_of(2, 2), rewards, preset).ledger, preset, ObjectiveConfig())
    assert alive.tolist() == [[False, True]]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["live", "dead", "ungraded"]), min_size=1, max_size=14), st.integers(1, 8))
def test_the_batch_is_the_live_ones_then_the_oldest_dead(drawn: list[str], count: int) -> None:
    count = min(count, len(drawn))
    numbers = [number for number, what in enumerate(drawn) if what != "ungraded"]
    places = training_places(numbers, [drawn[number] == "live" for number in numbers], count)
    trained = [number for number, place in zip(numbers, places, strict=True) if place is not None]
    taken = [place for place in places if place is not None]
    assert taken == sorted(set(taken)) and set(taken) <= set(range(count)), "in the order of the draw"
    assert len(taken) == min(count, len(numbers)), "the batch is full where it can be"
    live = [number for number in numbers if drawn[number] == "live"]
    dead = [number for number in numbers if drawn[number] == "dead"]
    assert trained == sorted([*live, *dead][:count])
    if len(drawn) == count:  # nothing was drawn beyond the batch
        assert places == numbers
    if len(numbers) < count:
        empty = set(range(count)) - set(taken)
        assert all(drawn[place] == "ungraded" for place in empty)


# ---------------------------------------------------------------- a run
@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch, texts(60), "rollout.dynamic_sampling=2")


def facts(runs: Runs, name: str, step: int) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """The header of a step's file and its groups."""
    header, *lines = [line for line in runs.lines(name, step) if "skipped" not in line]
    return header, [lines[start : start + SAMPLES] for start in range(0, len(lines), SAMPLES)]


def test_dead_groups_are_replaced_and_metrics_and_files_tell_all(runs: Runs) -> None:
    policy = runs.go("whole")
    stream = SampleStream(ShardDataset(sorted((runs.folder / "data").glob("*.tar"))), 1, window=8)
    position, several = 0, 0
    for step, metrics in enumerate(runs.metrics("whole")):
        header, groups = facts(runs, "whole", step)
        keys = [share[0]["key"] for share in groups]
        assert keys == [stream.key(i) for i in stream.indices(position, len(keys))], "in the order of the data"
        assert [share[0]["group_id"] for share in groups] == list(range(len(groups)))
        position += len(keys)
        live = [len({line["rewards"]["acc"] for line in share}) > 1 for share in groups]
        assert all({line["rewards"]["fmt_cot"] for line in share} == {1.0} for share in groups)
        # written out: rounds ask for what is missing, until nothing is, or two are done
        asked, rounds = 4, 0
        while rounds < 2 and sum(live[:asked]) < 4:
            asked, rounds = asked + 4 - sum(live[:asked]), rounds + 1
        assert (len(keys), header) == (asked, {"rounds": rounds, "further_prompts": asked - 4})
        several += rounds == 2
        ranked = sorted(range(asked), key=lambda group: not live[group])[:4]
        trained = [share[0]["trained_as"] for share in groups]
        assert [group for group in range(asked) if trained[group] is not None] == sorted(ranked)
        assert policy.trained[step] == list(enumerate(keys[group] for group in sorted(ranked)))
        num_dead = asked - sum(live)
        dead_trained = 4 - min(4, sum(live))
        expected = {
            "sampling/rounds": rounds,
            "sampling/drawn": asked,
            "sampling/dead_trained": dead_trained,
            "sampling/dead_dropped": num_dead - dead_trained,
            "groups/dead": num_dead / asked,
            "groups/dead/answer": num_dead / asked,
            "groups/skipped": 0.0,
            "accuracy": sum(line["rewards"]["acc"] for share in groups for line in share) / (2 * asked),
            "reward/acc": sum(line["rewards"]["acc"] for group in ranked for line in groups[group]) / 8,
        }
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert several and len({metrics["sampling/drawn"] for metrics in runs.metrics("whole")}) > 1
    assert any(metrics["accuracy"] != metrics["reward/acc"] for metrics in runs.metrics("whole"))


class Ends(Exception):
    """Stands for a kill."""


class Interrupted(Answering):
    """Does something at its first answer in the `number`th call of `generate` since it was made."""

    def __init__(self, number: int, what: Any) -> None:
        super().__init__()
        self._left, self._what, self._new = number, what, False

    def add(self, request_id: str, prepared: Any, draw: Any) -> None:
        self._new = self._new or request_id == "0/0/first"
        super().add(request_id, prepared, draw)

    def step(self) -> list[Any]:
        if self._new:
            self._left, self._new = self._left - 1, False
            if self._left == 0:
                self._what()
        return super().step()


def refill_of(runs: Runs, name: str, after: int) -> tuple[int, int]:
    """A step from `after` on that refilled, and which call of `generate` since `after` was its first refill."""
    calls = 0
    for step, metrics in enumerate(runs.metrics(name)):
        if step < after:
            continue
        if step > after and metrics["sampling/rounds"]:
            return step, calls + 2
        calls += 1 + int(metrics["sampling/rounds"])
    raise AssertionError("no step refills")


def check_same(runs: Runs, name: str, policy: Any, whole: Any) -> None:
    assert policy.number == whole.number
    assert untimed(runs.metrics(name)) == untimed(runs.metrics("whole"))
    for step in range(6):
        assert untimed_lines(runs.lines(name, step)) == untimed_lines(runs.lines("whole", step))


def untimed_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for line in lines:
        for rollout in (line.get("first"), line.get("second")):
            if rollout:
                del rollout["queued_at"], rollout["finished_at"]
    return lines


def test_a_run_that_is_killed_asked_to_stop_or_fails_within_a_refill_is_the_same_run(runs: Runs) -> None:
    whole = runs.go("whole")
    step, call = refill_of(runs, "whole", 0)

    def kill() -> None:
        raise Ends

    with pytest.raises(Ends):
        runs.go("killed", engine=Interrupted(call, kill))
    assert len(runs.metrics("killed")) == step, "before the step was done"
    assert max(runs.kept["killed"], default=0) <= step
    check_same(runs, "killed", runs.go("killed"), whole)

    with pytest.raises(SystemExit) as left:
        runs.go("asked", engine=Interrupted(call, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    assert left.value.code == 75 and max(runs.kept["asked"]) == step + 1, "at the end of the step"
    assert json.loads(json.dumps(runs.kept["asked"][step + 1][1].stream))["in_flight"] == []
    check_same(runs, "asked", runs.go("asked"), whole)

    def spoils(which: int, number: int, place: int) -> bool:
        return (which, number) == (step, 1)

    with pytest.raises(RewardError, match="it is spoiled"):
        runs.go("failed", wrapped=lambda made: Spoiling(made, spoils))
    progress = runs.kept["failed"][step][1]
    in_flight = [key for _, key in progress.stream["in_flight"]]
    _, groups = facts(runs, "whole", step)
    first = runs.metrics("whole")[step]
    assert 4 < len(in_flight) <= first["sampling/drawn"]
    assert in_flight == [share[0]["key"] for share in groups][: len(in_flight)], "it is drawn again from its first"
    check_same(runs, "failed", runs.go("failed"), whole)


def test_training_from_the_files_is_the_run(runs: Runs) -> None:
    """Whatever the configuration says of dynamic sampling by then."""
    whole = runs.go("whole")
    for name, setting in (("replayed", "rollout.dynamic_sampling=2"), ("plain", "rollout.dynamic_sampling=0")):
        policy = runs.go(name, setting, saved="whole")
        assert policy.number == whole.number and policy.trained == whole.trained
        assert untimed(runs.metrics(name)) == untimed(runs.metrics("whole"))


def test_without_training_the_first_step_is_that_of_the_run(runs: Runs) -> None:
    runs.go("whole", "train.steps=1", "train.save_every=1")
    runs.go("alone", "train.steps=1", trains=False)
    assert untimed_lines(runs.lines("alone", 0)) == untimed_lines(runs.lines("whole", 0))
    assert runs.kept["alone"] == {}


def test_off_it_draws_no_more_and_the_file_says_nothing_of_it(runs: Runs) -> None:
    policy = runs.go("off", "rollout.dynamic_sampling=0")
    assert all(len(trained) == 4 for trained in policy.trained)
    assert not [name for metrics in runs.metrics("off") for name in metrics if name.startswith("sampling/")]
    lines = runs.lines("off", 0)
    assert len(lines) == 4 * SAMPLES and all("key" in line and "trained_as" not in line for line in lines)


# ---------------------------------------------------------------- limits
@pytest.mark.parametrize(("rounds", "drawn"), [(1, 8), (2, 12), (3, 16)])
def test_rounds_end_and_the_oldest_dead_fill_the_batch(
    rounds: int, drawn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(tmp_path, monkeypatch, texts(40, lambda i: i % 4 in (RIGHT, WRONG)), "train.steps=2")
    policy = runs.go("dead", f"rollout.dynamic_sampling={rounds}")
    for step, metrics in enumerate(runs.metrics("dead")):
        _, groups = facts(runs, "dead", step)
        assert policy.trained[step] == [(place, groups[place][0]["key"]) for place in range(4)]
        found = {name: metrics[f"sampling/{name}"] for name in ("rounds", "drawn", "dead_trained", "dead_dropped")}
        assert found == {"rounds": rounds, "drawn": drawn, "dead_trained": 4, "dead_dropped": drawn - 4}
        assert metrics["groups/dead"] == 1.0


def test_a_small_data_set_gives_no_prompt_twice_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six prompts, four a step: a refill takes the two that are left, and whatever follows is the next step's."""
    dead = texts(6, lambda i: i % 4 == RIGHT)
    runs = Runs(tmp_path, monkeypatch, dead, "rollout.dynamic_sampling=9", "train.steps=5")
    policy = runs.go("small")
    seen: list[str] = []
    for step, metrics in enumerate(runs.metrics("small")):
        _, groups = facts(runs, "small", step)
        keys = [share[0]["key"] for share in groups]
        assert len(set(keys)) == len(keys) <= 6 and metrics["sampling/drawn"] == len(keys) >= 4
        assert metrics["sampling/rounds"] <= 2 and len(policy.trained[step]) == 4
        seen += keys
    stream = SampleStream(ShardDataset(sorted((tmp_path / "data").glob("*.tar"))), 1, window=8)
    assert seen == [stream.key(i) for i in stream.indices(0, len(seen))], "nothing is lost, nothing comes out of turn"
    assert runs.go("again", saved="small").number == policy.number


def test_a_data_set_smaller_than_a_step_is_not_asked_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompts come several times in a step, and each time their responses are other draws."""
    runs = Runs(tmp_path, monkeypatch, texts(3, lambda i: i % 4 >= DRAWN), "rollout.dynamic_sampling=3")
    runs.go("tiny", "train.steps=1", "rollout.prompts_per_step=8", "train.batch_size=8")
    header, groups = facts(runs, "tiny", 0)
    assert len(groups) == 8 and header == {"rounds": 0, "further_prompts": 0}
    ids = [line["first"]["rollout_id"] for share in groups for line in share]
    texts_of = {(line["key"], line["first"]["response_text"]) for share in groups for line in share}
    assert len(set(ids)) == 16 and len(texts_of) > 12


def test_groups_that_cannot_be_graded_are_replaced(runs: Runs) -> None:
    """Three of the four groups that a step begins with, and in the third step every one there is."""

    def spoils(step: int, call: int, place: int) -> bool:
        return (call == 0 and place < 3) or step == 2

    with pytest.raises(RewardError, match=r"no group of step 3 could be graded.*\(11 groups more failed\.\)"):
        runs.go("skipping", "train.save_every=1", skips=True, wrapped=lambda made: Spoiling(made, spoils))
    for step in range(2):
        metrics, trained = runs.metrics("skipping")[step], runs.lines("skipping", step)
        places = [line["trained_as"] for line in trained if line.get("trained_as") is not None]
        assert metrics["groups/skipped"] == 3 and sorted(set(places)) == [0, 1, 2, 3]
        assert metrics["sampling/drawn"] == len({line["group_id"] for line in trained if "group_id" in line})
    again = runs.go("replayed", "train.steps=2", saved="skipping")
    assert again.number == runs.kept["skipping"][2][0]


def test_where_too_few_can_be_graded_their_places_stay_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [0, 3, 5]  # of 4 prompts and 2 further ones
    assert training_places(numbers, [True, False, True], 4) == [0, 1, 3]


# ---------------------------------------------------------------- ranks
def test_all_ranks_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three engines, one of which has nothing to do where a refill asks for two prompts."""
    monkeypatch.setattr(live_rollouts, "Graders", Here)
    dataset = ShardDataset(write_shards(texts(30), tmp_path / "data", "train", 7))

    def steps(ranks: Any) -> list[StepRollouts]:
        feed = SampleFeed(SampleStream(dataset, 1), Quarantine(0), ranks=ranks)
        feed.divide(ranks)
        asked = sampling(num_samples=SAMPLES, template="cot", later=())
        made = generator(Answering(), max_description=5, engines=ranks)
        folder = tmp_path / f"rollouts{ranks.num_ranks}"
        source = LiveRollouts(made, asked, recorder(PRESET, SAMPLES), RewardsConfig(), ranks, folder, rounds=3)
        found = []
        with feed, source:
            for step in range(3):
                prompts = StepPrompts(feed, 6)
                found.append(source.take(prompts, step, Clock()))
                prompts.finish()
        return found

    alone = steps(Meeting(1).of(0))
    meeting = Meeting(3)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda rank: steps(meeting.of(rank)), range(3)))
    assert sum(step.rounds or 0 for step in alone) > 3 and min(step.num_drawn for step in alone) > 6
    for ours, *theirs in zip(alone, *together, strict=True):
        held = [group for each in theirs for group in each.groups]
        assert sorted(held, key=lambda group: group.group_id) == ours.groups
        for each in theirs:
            assert each.places == ours.places and each.rounds == ours.rounds and each.prompts.keys == ours.prompts.keys
            rewards = each.ledger.rollout_rewards
            assert all(torch.equal(rewards[name], value) for name, value in ours.ledger.rollout_rewards.items())


# ---------------------------------------------------------------- files, metrics, configuration
def test_a_damaged_file_is_named(runs: Runs) -> None:
    runs.go("whole", "train.steps=1", "train.save_every=1")
    path = rollouts_file(runs.folder / "whole" / "rollouts", 0)
    whole = step_lines(path)
    for file in step_files(path):
        file.unlink()
    dataset = ShardDataset(sorted((runs.folder / "data").glob("*.tar")))
    drawn: list[Any] = SampleStream(dataset, 1, window=8).take(0, 40)

    def read(*lines: dict[str, Any]) -> SavedPart:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_rollouts(path, lambda further: Listed(drawn[: 4 + further]), SAMPLES, ["acc"], PRESET.asked, ())

    further = whole[0]["further_prompts"]
    assert len(read(*whole).prompts.keys) == 4 + further > 4
    with pytest.raises(ValueError, match=rf"holds \d+ samples, the configuration asks for {4 + further} prompts"):
        read(*whole[: -2 * SAMPLES])
    for name in ("rounds", "further_prompts"):
        for wrong in (-1, 10**9, 1.0, True, "2"):
            with pytest.raises(ValueError, match=rf"{name}=.*damaged"):
                read({**whole[0], name: wrong}, *whole[1:])
    without = [{name: value for name, value in line.items() if name != "trained_as"} for line in whole]
    with pytest.raises(ValueError, match="line 2: it is no sample"):
        read(*without)
    for place in (7, -1, "0", True, 1.0):
        with pytest.raises(ValueError, match="no places of 4 prompts"):
            read(whole[0], *({**line, "trained_as": place} for line in whole[1:]))
    with pytest.raises(ValueError, match="no places of 4 prompts"):
        read(whole[0], *({**line, "trained_as": None} for line in whole[1:]))


def test_the_leak_filter_counts_for_what_is_dead(tmp_path: Path) -> None:
    """Two responses, one of which leaks: only with the filter do they earn different things."""
    (plain,), preset = groups_of(1, 2), PRESETS["vision_sr1"]
    made = [replace(plain, prompt=replace(plain.prompt, images=(Image.new("RGB", (28, 28)),)))]
    ones = dict.fromkeys(("acc", "fmt", "acc_vis", "fmt_vis", "format"), torch.ones(2))
    rollouts = rollouts_of(made, {**ones, "leak": torch.tensor([0.0, 1.0])}, preset)
    clock = Clock()
    with clock("rollout"):
        pass
    for filtered, dead in ((False, 1.0), (True, 0.0)):
        objective = ObjectiveConfig(leak_filter=filtered)
        metrics = step_metrics(rollouts, preset, objective, [StepResult({}, 0.0, 0.0)], clock)
        assert (metrics["groups/dead"], metrics["groups/dead/visual"]) == (dead, dead)
        assert metrics["groups/dead/answer"] == 1.0 and "sampling/drawn" not in metrics


def test_the_clock_adds_up_the_rounds() -> None:
    clock, once = Clock(), Clock()
    with once("rollout"):
        pass
    for _ in range(3):
        with clock("rollout"):
            sum(range(20_000))
    assert clock.seconds["seconds/rollout"] > 3 * once.seconds["seconds/rollout"]


@pytest.mark.parametrize("value", ["true", "-1", "101", "1.5", "null", "two"])
def test_other_numbers_of_rounds_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.dynamic_sampling"):
        load_config(None, [f"rollout.dynamic_sampling={value}"])
    assert Config().rollout.dynamic_sampling == 0
