"""Prompts that engines read as slots get free: the same groups as of prompts that were there from the beginning."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.ranks import ALONE, Exchange
from megatron_sr1.rollout import passes
from megatron_sr1.rollout.two_pass import DECODED_AHEAD
from megatron_sr1.types import SECOND, LaterPass, Prompt, PromptShare, RolloutGroup, Sampling
from tests.pass_cases import shown
from tests.scripted_engine import ScriptedEngine, generator, prompt, sampling, whole
from tests.test_pool import Numbers, Slow, in_order
from tests.test_two_pass import FailingEngine
from tests.thread_ranks import on_threads


def streamed(
    prompts: Sequence[Prompt | None],
    engines: Sequence[ScriptedEngine],
    how: Sampling,
    slots: int,
    *,
    pulled: bool,
    places: Sequence[int] | None = None,
) -> list[list[RolloutGroup]]:
    """What each engine hands on, in its order; None is a prompt that cannot be used."""
    numbers = Numbers() if pulled else None
    keys = [f"p{place}" for place in range(len(prompts))]
    left = list(range(len(prompts)) if places is None else places)
    shares = [left[number :: len(engines)] for number in range(len(engines))]

    def one(ranks: Exchange) -> list[RolloutGroup]:
        counter = None if numbers is None else numbers.of()
        made = generator(engines[ranks.rank], engines=ranks, weights=dict, counter=counter, slots=slots)
        found: list[RolloutGroup] = []
        made.stream(PromptShare(keys, {}, shares, lambda place: prompts[place]), how, 1, found.append)
        return found

    return on_threads(len(engines), one)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 17), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.data())
def test_everything_is_answered_once_as_if_it_were_there(
    count: int, engines: int, slots: int, samples: int, pulled: bool, data: st.DataObject
) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1)))
    prompts = [prompt(f"p{i}", num_images=i % 3) for i in range(count)]
    how = sampling(num_samples=samples)
    alone = generator(ScriptedEngine()).generate(whole(prompts), how, 1)
    given = [None if place in bad else one for place, one in enumerate(prompts)]
    found = streamed(given, [ScriptedEngine() for _ in range(engines)], how, slots, pulled=pulled)
    assert in_order(found) == [group for group in alone if group.group_id not in bad]


def test_the_draws_of_a_key_do_not_hang_on_what_is_left() -> None:
    """Samples of one name draw on, also where the first of them was answered before."""
    prompts = [prompt("same", num_images=0) for _ in range(3)]
    how = sampling(num_samples=2, later=(), template="cot")
    engine = ScriptedEngine()
    made = generator(engine, slots=4)
    made.stream(PromptShare(["same"] * 3, {}, [[2]], prompts.__getitem__), how, 0, lambda group: None)
    again = ScriptedEngine()
    generator(again).generate(whole(prompts), how, 0)
    wanted = {name: draw.seed for name, draw in again.draws.items() if name.startswith("2/")}
    assert {name: draw.seed for name, draw in engine.draws.items()} == wanted and len(wanted) == 2


@pytest.mark.parametrize("pulled", [False, True])
def test_passes_that_wait_are_answered(pulled: bool) -> None:
    """What is said of another image, of the prompts that are left; and what the starting weights read."""
    prompts = [shown(f"p{i}", bytes([i])) for i in range(9)]
    how = sampling(later=(SECOND, LaterPass("other", "other_description")))
    alone = generator(ScriptedEngine()).generate(whole(prompts), how, 1)
    assert in_order(streamed(prompts, [Slow(0.002), Slow(0.0)], how, 2, pulled=pulled)) == alone
    reference = sampling(later=(SECOND, LaterPass("start", reader="reference")))
    made = generator(ScriptedEngine(), slots=3, start_weights=dict, weights=dict)
    found: list[RolloutGroup] = []
    share = PromptShare([one.key for one in prompts], {}, [list(range(9))], prompts.__getitem__)
    made.stream(share, reference, 1, found.append)
    wanted = generator(ScriptedEngine(), start_weights=dict, weights=dict).generate(whole(prompts), reference, 1)
    assert in_order([found]) == wanted


def test_an_engine_that_fails_answers_what_it_had_taken_again() -> None:
    prompts = [prompt(f"p{i}") for i in range(12)]
    alone = generator(ScriptedEngine()).generate(whole(prompts), sampling(), 1)
    broken = FailingEngine(5, 9, error=RuntimeError("broken"))
    found = streamed(prompts, [broken, Slow(0.001)], sampling(), 4, pulled=True)
    assert in_order(found) == alone, "each once"


def test_nobody_waits_for_another_before_the_last() -> None:
    """Of two engines, one that stands until the other has answered everything else."""
    prompts = [prompt(f"p{i}", num_images=0) for i in range(30)]
    how = sampling(num_samples=1, later=(), template="cot")
    others, answered = threading.Event(), []

    class Stands(ScriptedEngine):
        def step(self) -> list[Any]:
            assert others.wait(60), "the other goes on"
            return super().step()

    class Counts(ScriptedEngine):
        def step(self) -> list[Any]:
            answered.append(1)
            if len(answered) >= len(prompts) - 1 - DECODED_AHEAD:
                others.set()
            return super().step()

    found = streamed(prompts, [Stands(), Counts()], how, 1, pulled=True)
    assert len(found[0]) + len(found[1]) == len(prompts) and len(found[1]) >= len(prompts) - 1 - DECODED_AHEAD


def test_what_is_handed_on_is_forgotten_and_little_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = passes.PassRequests.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(self)
        original(self, *arguments, **options)

    monkeypatch.setattr(passes.PassRequests, "__init__", noted)
    prompts, slots, read, taken, most = [prompt(f"p{i}") for i in range(100)], 4, [], [], []

    def fetch(place: int) -> Prompt:
        read.append(place)
        return prompts[place]

    def take(group: RolloutGroup) -> None:
        taken.append(group)
        (requests,) = made
        held = ("_prompts", "_left", "_pairs", "_missing", "_queued", "_open")
        most.append(max(len(vars(requests)[name]) for name in held))
        assert len(read) <= len(taken) + slots + DECODED_AHEAD + 4, "those of the comparison of pixels among them"

    engine = generator(ScriptedEngine(), engines=ALONE, slots=slots)
    engine.stream(PromptShare([one.key for one in prompts], {}, [list(range(100))], fetch), sampling(), 0, take)
    (requests,) = made
    assert len(taken) == 100 and max(most) <= 6 * slots
    assert not any(vars(requests)[name] for name in ("_prompts", "_left", "_pairs", "_missing", "_queued", "_open"))
