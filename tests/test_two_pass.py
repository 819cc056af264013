"""The order of the two passes, on an engine that answers from a script."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sr1.platform.ranks import TeamRanks
from megatron_sr1.prompts import SEE_THINK
from megatron_sr1.ranks import OneRank
from megatron_sr1.rollout.balance import deal_prompts, expected_tokens
from megatron_sr1.rollout.passes import PLANS_AT_A_TIME, SUBMITTED_AT_A_TIME
from megatron_sr1.rollout.plan import Limits, PassPrompt, Planner, check_same_ids, cut_description, refusal
from megatron_sr1.rollout.request import EngineFault, Generation
from megatron_sr1.rollout.seeds import request_seed
from megatron_sr1.rollout.two_pass import NUM_COMPARED, TwoPassGenerator
from megatron_sr1.rollout.vision_canary import stale_vision_canary
from megatron_sr1.types import SECOND, LaterPass, Passes, Prompt, RolloutGroup, Sampling, Turn
from tests.pass_cases import shown
from tests.scripted_engine import (
    EOT,
    IMAGE,
    PATCHES,
    SEEN,
    Letters,
    Picture,
    ScriptedEngine,
    dealt,
    generator,
    known,
    prompt,
    sampling,
    whole,
)
from tests.thread_ranks import Meeting


def test_defect_4_no_barrier_and_no_weight_load_between_the_passes() -> None:
    engine = ScriptedEngine()
    generator(engine).generate(whole([prompt("a"), prompt("b")]), sampling(), 0)
    assert engine.log.index("add 1/1/second") < engine.log.index("end 1/0/first")
    assert engine.weight_version == 9, "one weight load a step, by the loop, never inside a rollout"
    barrier = ScriptedEngine()
    generator(barrier, streamed=False).generate(whole([prompt("a"), prompt("b")]), sampling(), 0)
    assert barrier.log.index("add 1/1/second") > barrier.log.index("end 0/0/first")
    assert engine.draws == barrier.draws


def test_other_pixels_in_the_engine_stop_the_run_before_the_first_answer() -> None:
    """Compared once, of some prompts with images; each kind of difference has its words."""
    engine = ScriptedEngine()
    ours = generator(engine)
    for step in range(2):
        ours.generate(whole([prompt(f"{key}", num_images=key % 3) for key in range(9)]), sampling(), step)
    assert engine.log.count("own_view") == NUM_COMPARED
    wrong = [
        (PATCHES.flip(0), "in another order"),
        (PATCHES / 2, "another resizing, image_mean"),
        (PATCHES.flatten(), "engine's patches are"),
    ]
    for patches, words in wrong:
        engine = ScriptedEngine()
        engine.sees = patches
        with pytest.raises(ValueError, match=f"sample 'b', image 0: .*{words}"):
            generator(engine).generate(whole([prompt("a", num_images=0), prompt("b")]), sampling(), 0)
        assert not any(line.startswith("add") for line in engine.log)


def test_the_second_pass_holds_the_description_and_no_image() -> None:
    engine = ScriptedEngine()
    (group,) = generator(engine).generate(whole([prompt("a")]), sampling(), 3)
    pair = group.pairs[1]
    assert pair.description == "a 0/1/first"
    assert "a 0/1/first" in engine.prompts["0/1/second"] and "How many?" in engine.prompts["0/1/second"]
    assert "boxed{1}" not in engine.prompts["0/1/second"] and chr(IMAGE) not in engine.prompts["0/1/second"]
    assert pair.first.prompt_ids.count(IMAGE) == 3
    assert (pair.first.rollout_id, pair.second.rollout_id) == ("3/a/1/first", "3/a/1/second")
    assert (pair.second.response_text, pair.second.response_ids[-1]) == ("OK", EOT)
    assert len(pair.second.generator_logprobs) == 3 and pair.second.weight_version == 9


def test_without_a_description_there_is_no_second_pass() -> None:
    engine = ScriptedEngine(answer=lambda request_id: "\\boxed{1}" if "/0/" in request_id else SEEN.format("b"))
    (group,) = generator(engine).generate(whole([prompt("a")]), sampling(), 0)
    assert group.pairs[0].second is None and group.pairs[0].description is None
    assert group.pairs[1].second is not None
    (group,) = generator(ScriptedEngine()).generate(whole([prompt("a")]), sampling(later=()), 0)
    assert all(pair.second is None and pair.description == f"a 0/{pair.sample_index}/first" for pair in group.pairs)


def test_without_an_image_there_is_one_pass_with_the_plain_prompt() -> None:
    engine = ScriptedEngine()
    text, picture = generator(engine).generate(whole([prompt("t", num_images=0), prompt("p")]), sampling(), 0)
    assert all(pair.second is None and pair.description is None for pair in text.pairs)
    assert all(pair.second is not None for pair in picture.pairs)
    assert "description" not in engine.prompts["0/0/first"] and "description" in engine.prompts["1/0/first"]
    assert not [line for line in engine.log if line.startswith("add 0/") and line.endswith("second")]


def test_a_first_pass_that_was_cut_short_has_no_second_pass() -> None:
    """Also where it had described everything by then: it is no complete first pass."""

    class Endless(ScriptedEngine):
        def step(self) -> list[Generation]:
            (generation,) = super().step()
            return [replace(generation, finish_reason="length" if "/0/" in generation.request_id else "stop")]

    (group,) = generator(Endless()).generate(whole([prompt("a")]), sampling(), 0)
    assert [pair.second is None for pair in group.pairs] == [True, False]
    assert group.pairs[0].description is None and group.pairs[0].first.finish_reason == "length"


def test_groups_are_handed_on_as_they_complete() -> None:
    engine = ScriptedEngine()
    handed: list[tuple[Any, int]] = []
    prompts = [prompt("a"), prompt("b"), prompt("c")]
    groups = generator(engine).generate(
        whole(prompts), sampling(), 0, on_group=lambda group: handed.append((group, len(engine.log)))
    )
    assert [group.group_id for group, _ in handed] == [2, 1, 0], "the engine works from the last request to the first"
    assert sorted((group for group, _ in handed), key=lambda group: group.group_id) == groups
    assert handed[0][1] < len(engine.log) - 6, "long before the others are done"
    for group in groups:
        for pair in group.pairs:
            assert pair.second is not None
            assert 0 <= pair.first.queued_at < pair.first.finished_at <= pair.second.queued_at < pair.second.finished_at


def test_an_engine_sleeps_when_told_and_never_between_the_passes() -> None:
    engine = ScriptedEngine()
    made = generator(engine)
    made.generate(whole([prompt("a")]), sampling(), 0)
    assert "sleep" not in engine.log
    made.sleep()
    assert engine.log[-1] == "sleep"


def test_no_first_pass_waits_behind_a_second_one() -> None:
    engine = ScriptedEngine()
    generator(engine).generate(whole([prompt("a"), prompt("b")]), sampling(), 0)
    priorities = {request_id: draw.priority for request_id, draw in engine.draws.items()}
    order = sorted(priorities, key=lambda request_id: (priorities[request_id], request_id))
    expected = [f"{group}/{sample}/{name}" for name in ("first", "second") for group in (0, 1) for sample in (0, 1)]
    assert order == expected


def test_a_prompt_that_comes_again_in_a_step_is_answered_by_other_draws() -> None:
    """As in a data set smaller than a step; its first draws are those that it has alone."""
    engine, alone = ScriptedEngine(), ScriptedEngine()
    groups = generator(engine).generate(whole([prompt("a"), prompt("b"), prompt("a"), prompt("a")]), sampling(), 3)
    generator(alone).generate(whole([prompt("a"), prompt("b")]), sampling(), 3)
    assert all(engine.draws[name].seed == draw.seed for name, draw in alone.draws.items())
    assert len({draw.seed for draw in engine.draws.values()}) == len(engine.draws) == 4 * 2 * 2
    ids = [rollout.rollout_id for group in groups for pair in group.pairs for rollout in (pair.first, pair.second)]
    assert len(set(ids)) == 16 and ids[0] == "3/a/0/first" and groups[2].pairs[1].first.rollout_id == "3/a/3/first"
    assert [pair.sample_index for group in groups for pair in group.pairs] == [0, 1] * 4


class FailingEngine(ScriptedEngine):
    """Fails in the steps of these numbers, counted over restarts, losing what is in it."""

    def __init__(self, *failing: int, error: Exception) -> None:
        super().__init__()
        self._failing, self._error, self._steps = failing, error, 0

    def step(self) -> list[Generation]:
        self._steps += 1
        if self._steps in self._failing:
            raise self._error
        return super().step()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AssertionError("Encoder cache miss")])
@pytest.mark.parametrize("failing", [(1,), (3,), (4, 5), (8,)])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_failed_engine_is_restarted_and_every_prompt_is_answered(
    error: Exception, failing: tuple[int, ...], streamed: bool
) -> None:
    prompts, engine, handed = [prompt("a"), prompt("b")], FailingEngine(*failing, error=error), []
    weights = {"model.norm.weight": 7}
    recovering = generator(engine, weights=weights.items, streamed=streamed)
    groups = recovering.generate(whole(prompts), sampling(), 0, on_group=handed.append)
    healthy = ScriptedEngine()
    assert groups == generator(healthy, streamed=streamed).generate(whole(prompts), sampling(), 0)
    assert engine.draws == healthy.draws, "the same seeds and limits, so the same tokens"
    assert sorted(group.group_id for group in handed) == [0, 1], "each group is handed on once"
    restarts = [index for index, entry in enumerate(engine.log) if entry == "restart"]
    assert len(restarts) == len(failing)
    assert all(engine.log[index + 1] == f"weights {weights}" for index in restarts), "refilled before it goes on"
    assert all(rollout.weight_version == 9 for group in groups for rollout in (group.pairs[0].first,))


def test_what_was_finished_before_a_fault_is_not_asked_again() -> None:
    engine = FailingEngine(8, error=RuntimeError("late"))
    generator(engine, weights=dict).generate(whole([prompt("a"), prompt("b")]), sampling(), 0)
    assert engine.log.count("end 1/1/first") == engine.log.count("end 1/1/second") == 1
    assert len([entry for entry in engine.log if entry.startswith("add")]) == 8 + 1


def test_an_engine_that_keeps_failing_ends_the_run_with_its_error() -> None:
    engine = FailingEngine(2, 4, 6, error=RuntimeError("broken device"))
    with pytest.raises(EngineFault, match=r"3 times.*RuntimeError: broken device"):
        generator(engine, weights=dict).generate(whole([prompt("a"), prompt("b"), prompt("c")]), sampling(), 0)
    assert engine.log.count("restart") == 2


def test_an_updated_engine_that_nobody_can_refill_is_not_used_again() -> None:
    """It would answer from the weights of its model directory."""
    engine = FailingEngine(2, error=RuntimeError("late"))
    with pytest.raises(EngineFault, match=r"version 9.*cannot be refilled"):
        generator(engine).generate(whole([prompt("a")]), sampling(), 0)
    untouched = FailingEngine(2, error=RuntimeError("late"))
    untouched.weight_version = 0
    (group,) = generator(untouched).generate(whole([prompt("a")]), sampling(), 0)
    assert all(pair.second is not None for pair in group.pairs)


def test_a_mistake_in_the_input_is_no_fault_of_the_engine() -> None:
    engine = FailingEngine(2, error=ValueError("prompt is empty"))
    with pytest.raises(ValueError, match="prompt is empty"):
        generator(engine).generate(whole([prompt("a")]), sampling(), 0)
    assert "restart" not in engine.log


def test_an_error_of_who_takes_the_groups_is_no_fault_of_the_engine() -> None:
    def refuse(group: RolloutGroup) -> None:
        raise RuntimeError("no room")

    engine = ScriptedEngine()
    with pytest.raises(RuntimeError, match="no room"):
        generator(engine).generate(whole([prompt("a")]), sampling(), 0, on_group=refuse)
    assert "restart" not in engine.log


@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_the_engine_steps_while_images_of_later_prompts_are_prepared(num_samples: int) -> None:
    """A few requests at a time; how many does not depend on which patches are ready."""
    engine = ScriptedEngine()
    prompts = [prompt(str(key)) for key in range(40)]
    generator(engine).generate(whole(prompts), sampling(num_samples=num_samples, later=()), 0)
    events = [line.split()[0] for line in engine.log if line.startswith(("add", "end"))]
    first_step = events.index("end")
    assert first_step == min(math.ceil(SUBMITTED_AT_A_TIME / num_samples), PLANS_AT_A_TIME) * num_samples
    between = "".join("a" if event == "add" else "e" for event in events[first_step:]).rstrip("e").split("e")
    assert set(map(len, between)) <= {0, first_step, 40 * num_samples % first_step}, between
    assert engine.log.count("prepare") == 40 and events.count("end") == 40 * num_samples


def test_a_prompt_is_prepared_once_for_its_samples() -> None:
    engine = ScriptedEngine()
    generator(engine).generate(whole([prompt("a")]), sampling(num_samples=5, later=()), 0)
    assert engine.log.count("prepare") == 1


def test_a_first_pass_is_tokenised_once_for_check_and_generator() -> None:
    """8 prompts x 2 samples: 8 first passes, whoever asked first; the plans go with their prompts."""

    class Counting(Letters):
        texts: ClassVar[list[str]] = []

        def turn_ids(self, turn: Turn, num_images: int) -> tuple[int, ...]:
            self.texts.append(turn.before + turn.after)
            return super().turn_ids(turn, num_images)

    plans = Planner(Counting(), Limits(90, 1000, 50))  # type: ignore[arg-type]
    prompts = [prompt(f"p{index}") for index in range(8)]
    assert not any(plans.refusals(item, Passes("see_think", (SECOND,))) for item in prompts)
    TwoPassGenerator(ScriptedEngine(), plans).generate(whole(prompts), sampling(), 0)
    first = SEE_THINK.user_text(prompts[0].problem)
    assert Counting.texts.count(first) == 8
    assert len(Counting.texts) == 8 + 2 * 8 + 2 * 8, "second passes: two checks without a description, two samples"
    assert len(plans._firsts) == 8
    del prompts
    gc.collect()
    assert not plans._firsts


def test_draws_ban_media_and_end_at_the_turn() -> None:
    engine = ScriptedEngine()
    generator(engine).generate(whole([prompt("a")]), sampling(temperature=0.0), 0)
    for draw in engine.draws.values():
        assert (draw.temperature, draw.max_tokens, draw.end_of_turn_id, draw.banned_ids) == (0.0, 90, EOT, (IMAGE, 3))


def test_a_description_is_cut_to_its_limit() -> None:
    engine = ScriptedEngine(answer=lambda request_id: SEEN.format("x" * 40))
    (group,) = generator(engine, max_description=12).generate(whole([prompt("a")]), sampling(), 0)
    assert group.pairs[0].description == "a " + "x" * 10
    assert cut_description(Letters(), "abc\ufffd", 9) == "abc\ufffd"  # type: ignore[arg-type]
    assert cut_description(Letters(), "abc\ufffdd", 4) == "abc"  # type: ignore[arg-type]


def on_ranks(
    num_ranks: int, prompts: list[Prompt], how: Sampling, engines: dict[int, ScriptedEngine] | None = None
) -> tuple[list[Any], Meeting]:
    """What each rank returned or raised; `engines` are ranks with one of their own."""
    meeting = Meeting(num_ranks)

    def one(rank: int) -> Any:
        try:
            engine = (engines or {}).get(rank) or ScriptedEngine()
            ranked = generator(engine, engines=meeting.of(rank), weights=dict)
            return ranked.generate(dealt(prompts, how, meeting.of(rank)), how, 0)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(one, range(num_ranks))), meeting


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_rank_gets_the_groups_of_its_engine_in_order(num_ranks: int) -> None:
    prompts = [prompt(f"p{i}", num_images=1 + i % 2) for i in range(7)]
    results, meeting = on_ranks(num_ranks, prompts, sampling())
    assert all(groups == sorted(groups, key=lambda group: group.group_id) for groups in results)
    together = [(group.group_id, group.prompt.key) for groups in results for group in groups]
    assert sorted(together) == [(i, f"p{i}") for i in range(7)]
    sizes = [len(groups) for groups in results]
    assert max(sizes) - min(sizes) <= 1
    assert all(items == [] for sent in meeting.sent for items in sent), "no response goes round"


def test_a_sample_is_handed_on_when_its_first_pass_is_done() -> None:
    events: list[tuple[str, int, int]] = []

    def first(sample: RolloutGroup) -> None:
        (pair,) = sample.pairs
        assert pair.second is None and pair.description is not None
        events.append(("first", sample.group_id, pair.sample_index))

    prompts = [prompt(f"p{i}") for i in range(3)]
    generator(ScriptedEngine()).generate(
        whole(prompts), sampling(), 0, lambda group: events.append(("group", group.group_id, -1)), None, first
    )
    for number in range(3):
        mine = [event for event in events if event[1] == number]
        assert sorted(mine[:2]) == [("first", number, 0), ("first", number, 1)] and mine[2:] == [("group", number, -1)]


def test_one_rank_of_an_engine_holds_what_all_of_its_ranks_have() -> None:
    """Two engines of three ranks: what goes round is as much as with two engines of one rank."""
    prompts, meeting = [shown(f"p{i}", bytes([i])) for i in range(6)], Meeting(6)
    lends = sampling(later=(SECOND, LaterPass("other", "other_description")))

    def one(rank: int) -> Any:
        engines = TeamRanks(meeting.of(rank), 3)
        return generator(ScriptedEngine(), engines=engines, hands_on=rank % 3 == 0, weights=dict).generate(
            dealt(prompts, lends, engines), lends, 0
        )

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(one, range(6)))
    alone = generator(ScriptedEngine()).generate(whole(prompts), lends, 0)
    assert sorted([*results[0], *results[3]], key=lambda group: group.group_id) == alone
    assert all(results[rank] == [] for rank in (1, 2, 4, 5))
    for turn in range(len(meeting.sent[0])):
        assert all(meeting.sent[rank][turn] == [] for rank in (1, 2, 4, 5))


def test_engines_restart_together_and_healthy_ones_keep_their_answers() -> None:
    prompts = [prompt(f"p{i}") for i in range(4)]
    engines = {0: ScriptedEngine(), 1: FailingEngine(3, error=RuntimeError("rank 1"))}
    results, _ = on_ranks(2, prompts, sampling(), engines)
    together = sorted([*results[0], *results[1]], key=lambda group: group.group_id)
    assert together == generator(ScriptedEngine()).generate(whole(prompts), sampling(), 0)
    assert [engine.log.count("restart") for engine in engines.values()] == [1, 1], "they are made together"
    assert len([entry for entry in engines[0].log if entry.startswith("add")]) == 8, "2 prompts x 2 samples x 2 passes"


class Doubled(OneRank):
    def gather(self, items: list[Any]) -> list[Any]:
        return [*items, *items]


def test_ranks_that_share_an_engine_get_every_group_once() -> None:
    """Both ranks of a tensor-parallel engine make the same calls and gather the same groups."""
    prompts = [prompt("a"), Prompt("huge", "x" * 2000, "1")]
    twice = generator(ScriptedEngine(), engines=Doubled())
    assert [group.group_id for group in twice.generate(whole(prompts[:1]), sampling(), 0)] == [0]
    with pytest.raises(ValueError) as caught:
        twice.generate(whole(prompts), sampling(later=()), 0)
    assert str(caught.value).count("'huge', first pass") == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 400)), min_size=1, max_size=40), st.integers(1, 5))
def test_engines_get_all_prompts_in_even_shares(shapes: list[tuple[int, int]], num_engines: int) -> None:
    prompts = [
        Prompt(str(i), "x" * length, "1", (Picture(),) * images)  # type: ignore[arg-type]
        for i, (images, length) in enumerate(shapes)
    ]
    letters: Any = Letters()
    samples = [known(item) for item in prompts]
    shares = deal_prompts(letters, sampling(), samples, num_engines)
    assert sorted(index for share in shares for index in share) == list(range(len(prompts)))
    costs = [expected_tokens(letters, sample, sampling()) for sample in samples]
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs), "no engine has more than one prompt too many"


def test_expected_tokens_count_what_every_sample_costs() -> None:
    letters: Any = Letters()
    with_image, without = (expected_tokens(letters, known(prompt("a", num_images=n)), sampling()) for n in (1, 0))
    assert with_image == 3 + 2 + 2 * 2 + 2 * 2 * 45, (
        "image, question of 9 letters, twice again in second passes, answers"
    )
    assert without == 2 + 2 * 45, "no second pass, as there is nothing to describe"


def test_defect_5_a_refusal_reaches_every_rank_before_anything_is_submitted() -> None:
    prompts = [prompt("a"), Prompt("huge", "x" * 2000, "1"), prompt("c")]
    results, meeting = on_ranks(2, prompts, sampling())
    assert results[0] == results[1]
    assert "'huge', first pass" in results[0] and "1000" in results[0] and "'a'" not in results[0]
    assert [len(sent) for sent in meeting.sent] == [1, 1]


def test_defect_5_a_second_pass_that_cannot_fit_the_engine_is_refused_at_once() -> None:
    engine = ScriptedEngine(limit=700)
    with pytest.raises(ValueError, match="'a', second pass"):
        generator(engine, max_description=600).generate(whole([prompt("a")]), sampling(), 0)
    assert not engine.log


def test_an_unknown_first_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"template='caption_reasoner'.*see_think, cot"):
        generator(ScriptedEngine()).generate(whole([prompt("a")]), sampling(template="caption_reasoner"), 0)


def test_differing_ids_are_located() -> None:
    plan = PassPrompt("k7", "first", (5, IMAGE), (5, IMAGE, IMAGE, IMAGE), ())
    check_same_ids(plan, [5, IMAGE, IMAGE, IMAGE])
    with pytest.raises(ValueError, match=r"'k7', first pass.* 4 prompt ids.*used 2; .*position 1"):
        check_same_ids(plan, [5, 8])
    with pytest.raises(ValueError, match=r"used 3; .*position 3"):
        check_same_ids(plan, [5, IMAGE, IMAGE])


def test_refusal_starts_one_token_past_the_limit() -> None:
    plan = PassPrompt("k", "first", (1,) * 60, (1,) * 60, ())
    assert refusal(plan, Limits(40, 100, 0)) is None
    assert "60 tokens" in str(refusal(plan, Limits(41, 100, 0)))
    assert "61 tokens" in str(refusal(plan, Limits(40, 100, 0), reserved=1))


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.text(max_size=20), st.integers(0, 63))
def test_seeds_fit_and_depend_on_every_part(seed: int, step: int, key: str, sample: int) -> None:
    here = request_seed(seed, step, key, sample, "first")
    assert 0 <= here < 2**63
    others = [
        request_seed(seed + 1, step, key, sample, "first"),
        request_seed(seed, step + 1, key, sample, "first"),
        request_seed(seed, step, key + "x", sample, "first"),
        request_seed(seed, step, key, sample + 1, "first"),
        request_seed(seed, step, key, sample, "second"),
    ]
    assert len({here, *others}) == 6


def test_seeds_are_the_same_in_every_process() -> None:
    assert request_seed(1, 2, "k", 3, "second") == 800286729625773160


class WeightedEngine(ScriptedEngine):
    """Its log-probs are its vision weights; `deaf` and `drifting` are the two ways to be wrong."""

    def __init__(self, deaf: bool = False, drift: float = 0.0) -> None:
        super().__init__()
        self._deaf, self._drift, self._vision, self._updates = deaf, drift, (1.0, 2.0), 0

    def step(self) -> list[Generation]:
        request_id, prompt = self._queue.pop()
        return [Generation(request_id, prompt, (5, 6), self._vision, "length")]

    def update_weights(self, weights: Iterable[Any], version: int) -> None:
        self._updates += 1
        vision = dict(weights)["visual.x"] + self._drift * self._updates
        self._vision = self._vision if self._deaf else tuple(vision.tolist())


def canary(engine: WeightedEngine) -> None:
    weights = {"visual.x": torch.tensor([1.0, 2.0]), "model.norm.weight": torch.ones(2)}
    stale_vision_canary(engine, Letters(), Picture(), weights.items)  # type: ignore[arg-type]


def test_the_canary_tells_stale_and_lost_vision_weights_from_good_ones() -> None:
    canary(WeightedEngine())
    with pytest.raises(RuntimeError, match="stale image embeddings"):
        canary(WeightedEngine(deaf=True))
    with pytest.raises(RuntimeError, match="did not return"):
        canary(WeightedEngine(drift=0.1))
