"""Rewards that ask a model behind an endpoint, on a server that is slow, busy, broken or gone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sr1.config import ConfigError, JudgeConfig, ObjectiveConfig, RewardsConfig, load_config
from megatron_sr1.judge import judge_key
from megatron_sr1.rewards import Ungraded, find_reward
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.streams import check_objective, preset_from_config
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair
from tests.judge_server import JudgeServer, Script, serve


def group(number: int, *descriptions: str | None, answer: str = "10") -> RolloutGroup:
    def rollout(text: str, name: str) -> Rollout:
        return Rollout(f"0/p{number}/0/{name}", (1,), (2,), text, (-0.1,), "stop", 0)

    pairs = [
        RolloutPair(index, rollout(r"\boxed{10}", "first"), None if text is None else rollout("s", "second"), text)
        for index, text in enumerate(descriptions)
    ]
    return RolloutGroup(number, Prompt(f"p{number}", "What is the sum?", answer), tuple(pairs))


@contextmanager
def judging(
    script: Script, names: Sequence[str] = ("acc", "acc_judge"), **keys: Any
) -> Iterator[tuple[JudgeServer, Graders]]:
    fails_fast = keys.pop("fails_fast", True)
    with serve(script) as server:
        settings = {"timeout": 2.0, "backoff": 0.01, "retries": 2, **keys}
        judge = JudgeConfig(url=server.url, model="reader", **settings).endpoint
        with closing(Graders(names, num_workers=1, judge=judge, fails_fast=fails_fast)) as graders:
            yield server, graders


def sums(question: str, attempt: int) -> str:
    """Adds up the digits of the description; without digits it boxes nothing."""
    described = question.partition("Description of the image: ")[2].partition("\n")[0]
    digits = [int(word) for word in described.split() if word.isdecimal()]
    return rf"\boxed{{{sum(digits)}}}" if digits else "I cannot tell."


def test_the_answer_of_another_reader_is_the_reward() -> None:
    """Beside what is graded here, each response by itself; without a description nobody is asked."""
    with judging(sums) as (server, graders):
        graders.submit(group(0, "3 7", "3 8", "nothing", None))
        graders.submit(group(1, "3 7", answer="11"))
        graded = dict(graders.collect())
    assert graded[0] == [{"acc": 1.0, "acc_judge": value} for value in (1.0, 0.0, 0.0, 0.0)]
    assert graded[1] == [{"acc": 0.0, "acc_judge": 0.0}]
    assert len(server.requests) == 4 and all("What is the sum?" in str(one["messages"]) for one in server.requests)


def test_what_is_foreseen_is_asked_when_the_first_pass_is_done_and_once() -> None:
    """Before the group is there. A question that comes out otherwise than foreseen is asked then."""
    whole = group(0, "3 7", "3 8", "3 8", None)
    with judging(sums) as (server, graders):
        assert graders.ask_early is not None
        for pair in whole.pairs:
            graders.ask_early(replace(whole, pairs=(replace(pair, second=None),)))
        deadline = time.monotonic() + 30
        while len(server.requests) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(server.requests) == 3, "of each description, though two are the same"
        graders.submit(whole)
        assert [vector["acc_judge"] for vector in graders.collect()[0][1]] == [1.0, 0.0, 0.0, 0.0]
        assert len(server.requests) == 3
        graders.ask_early(replace(whole, pairs=(replace(whole.pairs[0], description="of another run"),)))
        graders.submit(whole)
        assert [vector["acc_judge"] for vector in graders.collect()[0][1]] == [1.0, 0.0, 0.0, 0.0]
        assert len(server.requests) == 3 + 1 + 3
        graders.submit(whole)
        graders.collect()
        assert len(server.requests) == 7 + 3, "nothing of a step before is left"
    with judging(sums, ("acc",)) as (_, graders):
        assert graders.ask_early is None


def test_an_outage_of_what_is_foreseen_is_an_error_too_and_soon_told() -> None:
    whole = group(0, *(f"{index} 1" for index in range(6)))
    with judging(lambda question, attempt: "500", concurrency=1) as (server, graders):
        for pair in whole.pairs:
            graders.ask_early(replace(whole, pairs=(replace(pair, second=None),)))
        graders.submit(whole)
        ((_, told),) = graders.collect()
        assert isinstance(told, Ungraded) and "'acc_judge' failed on response 0 to sample 'p0'" in told.reason
        assert len(server.attempts) == 1, "one question, as often as it may be asked"


def test_questions_run_beside_each_other_as_many_as_may() -> None:
    def slow(question: str, attempt: int) -> str:
        time.sleep(0.05)
        return sums(question, attempt)

    with judging(slow, concurrency=3) as (server, graders):
        for number in range(4):
            graders.submit(group(number, *(f"{index} {10 - index}" for index in range(4))))
        graded = graders.collect()
    assert [vector["acc_judge"] for _, vectors in graded for vector in vectors] == [1.0] * 16
    assert server.most_running <= 3


def test_a_busy_endpoint_is_asked_again() -> None:
    with judging(lambda question, attempt: "503" if attempt == 0 else sums(question, attempt)) as (server, graders):
        graders.submit(group(0, "3 7", "4 6"))
        assert [vector["acc_judge"] for vector in graders.collect()[0][1]] == [1.0, 1.0]
    assert set(server.attempts.values()) == {2}


@pytest.mark.parametrize(
    ("step", "reason"), [("500", "3 attempts failed"), ("401", "HTTP 401: check the URL, rewards.j")]
)
def test_an_outage_is_an_error_and_never_a_zero(step: str, reason: str) -> None:
    """And soon told: what waits is not asked. The next step asks again."""
    is_up: list[bool] = []
    with judging(lambda question, _: sums(question, 0) if is_up else step, concurrency=1) as (server, graders):
        for number in range(6):
            graders.submit(group(number, *(f"{index} {number}" for index in range(4))))
        graded = dict(graders.collect())
        assert len(server.attempts) == 1, "one question, as often as it may be asked"
        (told,) = {share.reason for share in graded.values() if isinstance(share, Ungraded)}
        assert len(graded) == 6 and "'acc_judge' failed on response 0 to sample 'p0'" in told and reason in told
        is_up.append(True)
        graders.submit(group(9, "3 7"))
        assert graders.collect() == [(9, [{"acc": 1.0, "acc_judge": 1.0}])]


def test_where_groups_are_skipped_one_refused_question_spoils_its_own_group_alone() -> None:
    with judging(
        lambda question, attempt: "400" if "9 9" in question else sums(question, attempt), fails_fast=False
    ) as (_, graders):
        graders.submit(group(0, "3 7", "9 9"))
        graders.submit(group(1, "3 7", "4 6"))
        graded = dict(graders.collect())
    assert isinstance(graded[0], Ungraded) and "HTTP 400" in graded[0].reason
    assert graded[1] == [{"acc": 1.0, "acc_judge": 1.0}] * 2


def passes_over(pair: RolloutPair, prompt: Prompt, ask: Any) -> float:
    try:
        ask("?")
    except Exception:
        return 0.0
    return 1.0


def test_a_function_that_passes_over_an_outage_makes_no_0_of_it() -> None:
    name = "tests.test_judged_rewards:passes_over"
    with judging(lambda question, attempt: "500", (name,)) as (_, graders):
        graders.submit(group(0, "3 7"))
        ((_, told),) = graders.collect()
    assert isinstance(told, Ungraded) and f"{name} of response 0 to sample 'p0' were not answered" in told.reason


def test_closing_waits_for_no_patience() -> None:
    start = time.monotonic()
    with judging(lambda question, attempt: "500", backoff=60.0, retries=5) as (server, graders):
        graders.submit(group(0, "3 7"))
        while not server.attempts:
            time.sleep(0.01)
    assert time.monotonic() - start < 30


def test_a_reward_of_a_user_s_own_asks_what_it_likes(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def polite(pair, prompt, ask):\n    return float(ask(f'Polite? {pair.first.response_text}') == 'yes')\n"
    )
    name = f"{file}:polite"
    assert find_reward(name).needs == ("images", "judge")
    with judging(lambda question, attempt: "yes" if "boxed" in question else "no", ["acc", name]) as (_, graders):
        graders.submit(group(0, None))
        assert graders.collect() == [(0, [{"acc": 1.0, name: 1.0}])]
    other = tmp_path / "other.py"
    other.write_text("from megatron_sr1.rewards import Reward\nf = Reward(lambda group: 1, needs=('group', 'judge'))")
    with pytest.raises(ValueError, match="a group's function cannot ask a judge"):
        find_reward(f"{other}:f")


def test_without_an_endpoint_nothing_starts() -> None:
    objective = ObjectiveConfig(preset="external_reasoner")
    with pytest.raises(ConfigError, match=r"rewards.judge.url=''.*'acc_judge' asks"):
        check_objective(objective, RewardsConfig())
    with pytest.raises(ValueError, match=r"acc_judge need a judge: set rewards\.judge\.url"):
        Graders(["acc", "acc_judge"])
    judge = JudgeConfig(url="http://127.0.0.1:1/v1", model="m", api_key_env="NO_SUCH_VARIABLE")
    check_objective(objective, replace(RewardsConfig(), judge=judge))
    with pytest.raises(ConfigError, match=r"rewards.judge.api_key_env='NO_SUCH_VARIABLE'"):
        judge_key(judge.endpoint)
    _, visual = preset_from_config(objective).streams
    assert visual.rewards == (("acc_judge", 1.0),) and (visual.trajectory, visual.tokens) == ("first", "description")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("url=ftp://x", "rewards.judge.url"),
        ("url=http://user:sk-1@host/v1", "rewards.judge.url"),
        ("url=http://host/v1", "rewards.judge.model"),
        ("concurrency=0", "rewards.judge.concurrency"),
        ("timeout=0", "rewards.judge.timeout"),
    ],
)
def test_a_wrong_key_of_the_judge_is_named(words: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as told:
        load_config(None, [f"rewards.judge.{words}"])
    assert "sk-1" not in str(told.value)
