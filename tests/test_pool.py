"""Engines that take prompts as they get free slots: everything is answered once, by whom is no matter for tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.config import Config, ConfigError, load_config
from megatron_sr1.ranks import Exchange, OneRank
from megatron_sr1.rollout.pool import PromptPool, begun, in_turn, reads
from megatron_sr1.rollout.request import Generation
from megatron_sr1.types import SECOND, LaterPass, Prompt, PromptShare, RolloutGroup, Sampling
from tests.pass_cases import shown
from tests.ranks import run_ranks
from tests.scripted_engine import ScriptedEngine, generator, prompt, sampling, whole
from tests.test_two_pass import FailingEngine
from tests.thread_ranks import on_threads


@dataclass
class Numbers:
    """A counter of threads."""

    drawn: dict[str, int] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def of(self) -> Drawing:
        return Drawing(self)


class Drawing:
    def __init__(self, numbers: Numbers) -> None:
        self._numbers, self._name = numbers, ""

    def begin(self, name: str) -> None:
        self._name = name

    def next(self) -> int:
        with self._numbers.lock:
            number = self._numbers.drawn.get(self._name, 0)
            self._numbers.drawn[self._name] = number + 1
            return number


class Slow(ScriptedEngine):
    """Each step takes so long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def step(self) -> list[Generation]:
        time.sleep(self._seconds)
        return super().step()


def share_of(prompts: Sequence[Prompt], engines: int, engine: int, read: list[int] | None = None) -> PromptShare:
    """Of engines that take turns; `read` notes what is read of another's."""
    shares = [list(range(number, len(prompts), engines)) for number in range(engines)]

    def fetch(place: int) -> Prompt:
        assert place not in shares[engine]
        if read is not None:
            read.append(place)
        return prompts[place]

    own = {place: prompts[place] for place in shares[engine]}
    return PromptShare([one.key for one in prompts], own, shares, fetch)


def answered(
    prompts: Sequence[Prompt], engines: Sequence[ScriptedEngine], how: Sampling, slots: int, steps: int = 1
) -> list[list[list[RolloutGroup]]]:
    """What each engine has, of each step."""
    numbers = Numbers()

    def one(ranks: Exchange) -> list[list[RolloutGroup]]:
        made = generator(engines[ranks.rank], engines=ranks, weights=dict, counter=numbers.of(), slots=slots)
        share = share_of(prompts, ranks.num_ranks, ranks.rank)
        return [made.generate(share, how, step) for step in range(steps)]

    return on_threads(len(engines), one)


def in_order(found: Sequence[Sequence[RolloutGroup]]) -> list[RolloutGroup]:
    return sorted((group for groups in found for group in groups), key=lambda group: group.group_id)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 23), st.integers(1, 4), st.integers(1, 7), st.integers(1, 3))
def test_everything_is_answered_once_as_if_by_one(count: int, engines: int, slots: int, samples: int) -> None:
    prompts = [prompt(f"p{i}", num_images=i % 3) for i in range(count)]
    how = sampling(num_samples=samples)
    alone = generator(ScriptedEngine()).generate(whole(prompts), how, 1)
    found = answered(prompts, [ScriptedEngine() for _ in range(engines)], how, slots, steps=2)
    assert in_order([steps[1] for steps in found]) == alone
    assert all(groups == in_order([groups]) for steps in found for groups in steps)


def test_other_passes_and_barriers_see_what_was_taken() -> None:
    """A pass that reads of another image waits for all engines, and lends from whoever has answered."""
    prompts = [shown(f"p{i}", bytes([i])) for i in range(9)]
    how = sampling(later=(SECOND, LaterPass("other", "other_description")))
    alone = generator(ScriptedEngine()).generate(whole(prompts), how, 0)
    assert in_order([steps[0] for steps in answered(prompts, [Slow(0.002), Slow(0.0)], how, 2)]) == alone


def test_an_engine_that_fails_goes_on_with_what_it_has_taken() -> None:
    prompts = [prompt(f"p{i}") for i in range(12)]
    alone = generator(ScriptedEngine()).generate(whole(prompts), sampling(), 0)
    broken = FailingEngine(5, 9, error=RuntimeError("broken"))
    assert in_order([steps[0] for steps in answered(prompts, [broken, Slow(0.001)], sampling(), 4)]) == alone
    assert broken.log.count("restart") == 2


def test_a_slow_engine_answers_less_and_nobody_waits_for_its_share() -> None:
    """Dealt out it would have 24 of 48. Of two engines, one five times as fast, a sixth is expected: 8 groups, and
    what it has taken when the other is done."""
    prompts = [prompt(f"p{i}", num_images=0) for i in range(48)]
    how = sampling(num_samples=1, later=(), template="cot")
    slow, fast = (steps[0] for steps in answered(prompts, [Slow(0.02), Slow(0.004)], how, 2))
    assert len(slow) + len(fast) == 48 and 2 <= len(slow) <= 16, "far less than its half"


def test_an_engine_begins_with_its_own_and_decodes_another_s_where_it_takes_one() -> None:
    prompts, read = [prompt(f"p{i}") for i in range(10)], []
    share = share_of(prompts, 2, 0, read)
    assert list(begun(share, 0, 2).own) == [0, 2] and list(begun(share, 0, 99).own) == [0, 2, 4, 6, 8]
    numbers = Numbers().of()
    numbers.begin("a")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as decoding:
        pool = PromptPool(in_turn(share, 2), numbers.next, reads(share), decoding)
        taken = []
        while (one := pool.take()) is not None:
            assert one[1] is prompts[one[0]]
            taken.append(one[0])
    assert taken == [4, 5, 6, 7, 8, 9] and sorted(read) == [5, 7, 9], "in turn; its own are decoded already"
    assert pool.take() is None


def test_one_engine_alone_draws_nothing() -> None:
    class Never:
        def begin(self, name: str) -> None:
            raise AssertionError

        next = begin

    made = generator(ScriptedEngine(), engines=OneRank(), counter=Never(), slots=1)
    assert len(made.generate(share_of([prompt(f"p{i}") for i in range(5)], 1, 0), sampling(), 0)) == 5


# ---------------------------------------------------------------- the job's counter
def draw_on_four_ranks(rank: int, num_ranks: int, folder: str) -> None:
    """Two teams of two: the ranks of a team draw the same, all together each number once, and again from 0."""
    from megatron_sr1.platform import GroupRanks, Platform, TeamCounter

    platform = Platform(torch.device("cpu"), rank, num_ranks)
    for late in range(3):
        time.sleep(0.3 if rank == late else 0.0)
        came = time.monotonic()
        platform.wait_for_all()
        times = GroupRanks().gather([(came, time.monotonic())])
        assert max(came for came, _ in times) <= min(left for _, left in times), "nobody leaves before all are there"
    for size in (1, 2, 4):
        counter = TeamCounter(GroupRanks(), size)
        for name in (f"{size}a", f"{size}b"):
            counter.begin(name)
            drawn = [counter.next() for _ in range(5)]
            together = GroupRanks().gather([tuple(drawn)])
            teams = [set(together[start : start + size]) for start in range(0, num_ranks, size)]
            assert all(len(team) == 1 for team in teams)
            assert sorted(number for team in teams for number in next(iter(team))) == list(range(5 * len(teams)))
    (Path(folder) / f"done{rank}").touch()


def test_the_ranks_of_an_engine_draw_the_same_numbers(tmp_path: Path) -> None:
    run_ranks(4, draw_on_four_ranks, str(tmp_path))
    assert len(list(tmp_path.glob("done*"))) == 4


def test_pulling_and_the_same_bits_exclude_each_other() -> None:
    assert Config().rollout.pull is None
    with pytest.raises(ConfigError, match=r"rollout\.pull=True .*precision\.deterministic"):
        load_config(None, ["rollout.pull=true", "precision.deterministic=true"])
    assert load_config(None, ["rollout.pull=false", "precision.deterministic=true"]).rollout.pull is False
