"""A value is made once, by the pool or by whoever asks first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest

from megatron_sr1.ahead import Later


def test_what_the_pool_has_begun_is_waited_for_and_what_it_has_not_is_made_here() -> None:
    begun, go_on = Event(), Event()
    made: list[str] = []

    def slow() -> str:
        begun.set()
        go_on.wait(30)
        made.append("slow")
        return "slow"

    def quick() -> str:
        made.append("quick")
        return "quick"

    with ThreadPoolExecutor(1) as pool:
        first, second = Later(slow, pool), Later(quick, pool)
        for each in (first, second, first):
            each.start()
        assert begun.wait(30)
        assert second() == second() == "quick", "the pool is busy with the first"
        found: list[str] = []
        others = [Thread(target=lambda: found.append(first())) for _ in range(3)]
        for other in others:
            other.start()
        assert not found
        go_on.set()
        for other in others:
            other.join(30)
    assert found == ["slow"] * 3 and made == ["quick", "slow"]


def test_without_a_pool_nothing_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    later = Later(lambda: made.append(1))
    later.start()
    assert not later.started and not made
    later()
    later()
    assert later.started and made == [1]


@pytest.mark.parametrize("pooled", [False, True])
def test_a_failure_is_told_to_everybody_who_asks(pooled: bool) -> None:
    def fail() -> None:
        raise OSError("truncated")

    with ThreadPoolExecutor(1) as pool:
        later = Later(fail, pool if pooled else None)
        later.start()
        for _ in range(2):
            with pytest.raises(OSError, match="truncated"):
                later()
