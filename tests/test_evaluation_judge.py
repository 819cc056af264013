"""The judge against a real HTTP server that is slow, busy, broken, or lies."""

from __future__ import annotations

import datetime
import email.utils
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sr1.config import ConfigError, EvaluateConfig
from megatron_sr1.evaluation import (
    Verdict,
    judge_records,
    read_records,
    summarise_records,
)
from megatron_sr1.judge import Judge, NoVerdict, judge_key
from megatron_sr1.prompts import CAPTION_REASONER

from .evaluation_cases import append_records, pair, record
from .judge_server import JudgeServer, Script, serve

BACKOFF = 0.01  # seconds


@contextmanager
def judging(script: Script, **keys: object) -> Iterator[tuple[JudgeServer, Judge, list[float]]]:
    """A server, a judge that asks it, and the seconds that the judge waited; it does not really wait."""
    waits: list[float] = []
    with serve(script) as server:
        settings = {"judge_timeout": 1.0, "judge_backoff": BACKOFF, "judge_retries": 4, **keys}
        config = EvaluateConfig(judge_url=server.url, judge_model="big", **settings)
        with Judge(config.judge, waits.append) as judge:
            yield server, judge, waits


def steps(*wanted: str) -> Script:
    return lambda _, attempt: wanted[min(attempt, len(wanted) - 1)]


@pytest.mark.parametrize(
    "failure",
    [
        "429",
        "500",
        "502",
        "503",
        "408",
        "hang",
        "reset",
        'JSON {"choices": [',
        "JSON {}",
        "JSON []",
        "JSON x",
        'JSON {"choices": [1]}',
    ],
)
def test_what_may_pass_is_tried_again(failure: str) -> None:
    with judging(steps(failure, failure, r"\boxed{7}")) as (server, judge, waits):
        assert judge.ask("question") == r"\boxed{7}"
    assert server.attempts == {"question": 3} and len(waits) == 2


def test_waits_grow_and_scatter_and_heed_the_endpoint() -> None:
    def once(*wanted: str) -> list[float]:
        with judging(steps(*wanted, "answer"), judge_retries=8, judge_max_wait=50.0) as (_, judge, waits):
            judge.ask("question")
        return waits

    plain = [once(*["500"] * 6) for _ in range(2)]
    for waits in plain:
        assert all(0.75 * BACKOFF * 2**i <= wait <= 1.25 * BACKOFF * 2**i for i, wait in enumerate(waits))
    assert plain[0] != plain[1]
    assert once("429 7", "500", "503 13") == [7.0, pytest.approx(2 * BACKOFF, rel=0.25), 13.0]
    assert once("429 3600") == [50.0], "no longer than the limit"
    date = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30))
    (until,) = once(f"503 {date}")
    assert 25 < until < 30
    for damaged in ("soon", "-3", "Wed, 99 Foo"):
        assert once(f"429 {damaged}")[0] < 1.0


@pytest.mark.parametrize(
    ("script", "attempts", "reason"),
    [
        (steps("503"), 5, "5 attempts failed, the last with: HTTP 503"),
        (steps("reset"), 5, "5 attempts failed, the last with: APIConnectionError"),
        (steps("hang"), 2, "2 attempts failed, the last with: APITimeoutError"),
        (steps("drip"), 2, "the last with: APITimeoutError: the answer was not whole after"),
        (steps("flood"), 2, "the last with: APIConnectionError: the answer has more than 16 MiB"),
        (steps("packed"), 2, "the last with: APIConnectionError: the answer is compressed"),
        (steps("400"), 1, "refuses this question with HTTP 400"),
        (steps("cut"), 1, "max_tokens"),
        (steps("empty"), 1, "is empty"),
    ],
)
def test_what_remains_is_no_verdict(script: Script, attempts: int, reason: str) -> None:
    with judging(script, judge_retries=max(attempts - 1, 1)) as (server, judge, _):
        with pytest.raises(NoVerdict, match=reason):
            judge.ask("question")
        assert server.attempts == {"question": attempts}


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refusal_of_everything_is_an_error_of_the_configuration(status: str) -> None:
    with judging(steps(status)) as (server, judge, _), pytest.raises(ConfigError, match=f"HTTP {status}") as error:
        judge.ask("question")
    assert server.url in str(error.value) and "'big'" in str(error.value) and "judge_api_key_env" in str(error.value)
    assert "sk-secret" not in str(error.value)
    assert server.attempts == {"question": 1}


def test_what_is_asked_goes_nowhere_else() -> None:
    with serve(steps("answer")) as other:
        elsewhere = steps(f"307 {other.url}/chat/completions")
        refused = pytest.raises(ConfigError, match="answers with HTTP 307, a redirection, which is not followed")
        with judging(elsewhere) as (server, judge, _), refused:
            judge.ask("question")
        assert not other.requests and len(server.requests) == 1


def test_the_request_is_what_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another endpoint")
    parameters = {"temperature": None, "max_tokens": 99, "chat_template_kwargs": {"enable_thinking": False}}
    with judging(steps("answer"), judge_parameters=parameters) as (server, judge, _):
        judge.ask("größer?")
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions" and request["headers"]["authorization"] == "Bearer none"
    assert request["messages"] == [{"role": "user", "content": "größer?"}] and request["model"] == "big"
    assert request["max_tokens"] == 99 and "temperature" not in request
    assert request["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_key_comes_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig(judge_url="http://127.0.0.1:1/v1", judge_model="big", judge_api_key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="judge_api_key_env='JUDGE_KEY'"):
        judge_key(config.judge)
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    with judging(steps("answer"), judge_api_key_env="JUDGE_KEY") as (server, judge, _):
        judge.ask("question")
    assert server.requests[0]["headers"]["authorization"] == "Bearer sk-1"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"judge_url": "localhost:8000", "judge_model": "m"}, "judge_url"),
        ({"judge_url": "ftp://host/v1", "judge_model": "m"}, "judge_url"),
        ({"judge_url": "http://user:sk-1@host/v1", "judge_model": "m"}, "judge_url"),
        ({"judge_url": "http://host/v1?key=sk-1", "judge_model": "m"}, "judge_url"),
        ({"judge_url": "http://127.0.0.1/v1"}, "judge_model"),
        ({"judge_concurrency": 0}, "judge_concurrency"),
        ({"judge_retries": -1}, "judge_retries"),
        ({"samples": 4}, r"evaluate.temperature=0.0 is not allowed: it must be greater than 0 where .*samples=4"),
        ({"temperature": 1.0, "verify_export": 2}, "verify_export"),
        ({"chunk_prompts": 0}, "chunk_prompts"),
    ],
)
def test_a_wrong_setting_is_named(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        EvaluateConfig(**keys)
    assert "sk-1" not in str(error.value)


# ---------------------------------------------------------------- over records
@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Prompts p0 to p9 with the gold answers 0 to 9: two samples each, the second of p8 and p9 without a description;
    and one prompt without an image."""
    path = tmp_path / "evaluate.jsonl"
    for number in range(10):
        second = pair("1", "nothing" if number < 8 else None, None)
        first = pair(str(number), f"I see {number}.", None)
        append_records(path, [record(f"p{number}", [first, second], gold=str(number))])
    append_records(path, [record("text", [pair("10", None, None)], template="cot")])
    return path


def _reader(question: str, _: int) -> str:
    """A judge that answers with the number it reads, and in words where there is none."""
    numbers = [word.strip(".") for word in question.split("\n")[0].split() if word.strip(".").isdecimal()]
    return rf"<think> t </think> \boxed{{{numbers[0]}}}" if numbers else "The description does not say."


def test_verdicts_are_graded_and_missing_ones_are_asked_for_again(path: Path) -> None:
    before = list(read_records(path))
    broken = {"3", "5"}

    def script(question: str, attempt: int) -> str:
        return "500" if any(f"I see {number}." in question for number in broken) else _reader(question, attempt)

    with judging(script, judge_retries=1) as (server, judge, _):
        outcome = judge_records(path, judge.ask, "big", 3)
        assert (outcome.num_asked, outcome.num_missing) == (18, 2) and "HTTP 500" in outcome.last_failure
        assert server.most_running <= 3
        some, _ = summarise_records(read_records(path), "big")
        # 18 descriptions of which 2 are not known, and 2 samples without one: 8 of 18 suffice
        assert some["judge_missing"] == 2 and some["judged_accuracy"] == 8 / 18
        assert some["num_samples"] == 21

        broken.clear()
        server.attempts.clear()
        outcome = judge_records(path, judge.ask, "big", 3)
        assert (outcome.num_asked, outcome.num_missing, outcome.last_failure) == (2, 0, "")
        assert sum(server.attempts.values()) == 2 and all("I see" in question for question in server.attempts)
    after = list(read_records(path))
    assert [[replace(sample, judge=None) for sample in r.samples] for r in after] == [list(r.samples) for r in before]
    verdict = Verdict("big", r"<think> t </think> \boxed{3}", True)
    assert after[3].samples[0].judge == verdict and after[-1].samples[0].judge is None
    assert after[9].samples[1].judge is None, "there was no description"
    assert after[2].samples[1].judge == Verdict("big", "The description does not say.", False)
    every, _ = summarise_records(after, "big")
    # the first sample of each is right and suffices; the second of p1 is right, and does not
    assert every["judge_missing"] == 0 and every["judged_accuracy"] == 10 / 20
    assert every["language_shortcut_rate_judged"] == 1 / 20
    assert [p.name for p in path.parent.iterdir()] == ["evaluate.jsonl"]


def test_the_judge_sees_description_and_question_alone(path: Path) -> None:
    with judging(_reader) as (server, judge, _):
        judge_records(path, judge.ask, "big", 1)
    request = next(r for r in server.requests if "I see 4." in r["messages"][0]["content"])
    expected = CAPTION_REASONER.user_text("Question p4?", 0, "I see 4.")
    assert expected.startswith("Description of the image: I see 4.\n\nQuestion p4?\n\n")
    assert request["messages"] == [{"role": "user", "content": expected}]


def test_interrupted_judging_goes_on_to_the_same_bytes(path: Path, tmp_path: Path) -> None:
    """The key is withdrawn after eight answers; the journal's last line is torn, as by a kill."""
    whole = tmp_path / "whole" / "evaluate.jsonl"
    whole.parent.mkdir()
    whole.write_bytes(path.read_bytes())
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        if len(asked) > 8:
            raise ConfigError("the key was withdrawn")
        return _reader(question, 0)

    judge_records(whole, lambda question: _reader(question, 0), "big", 2)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="withdrawn"):
        judge_records(path, ask, "big", 1)
    journal = path.with_suffix(".verdicts.jsonl")
    assert path.read_bytes() == before and len(journal.read_text().splitlines()) == 8
    journal.write_bytes(journal.read_bytes()[:-5])
    again: list[str] = []
    judge_records(path, lambda question: again.append(question) or _reader(question, 0), "big", 2)
    assert len(again) == 18 - 7 and path.read_bytes() == whole.read_bytes() and not journal.exists()


def test_another_judge_is_asked_again(path: Path) -> None:
    judge_records(path, lambda question: _reader(question, 0), "big", 1)
    outcome = judge_records(path, lambda _: r"\boxed{0}", "small", 1)
    assert outcome.num_asked == 18
    assert {sample.judge.model for r in read_records(path) for sample in r.samples if sample.judge} == {"small"}


@pytest.mark.parametrize(
    ("answer", "rounded", "right"),
    [("1/3", False, True), ("0.33", False, False), ("0.33", True, True), ("A", True, False)],
)
def test_the_judge_is_graded_with_the_choices_and_as_the_second_pass(
    tmp_path: Path, answer: str, rounded: bool, right: bool
) -> None:
    path = tmp_path / "evaluate.jsonl"
    append_records(path, [record("k", [pair("B", "I see.", "B")], gold="B", choices=("1/2", "1/3"), ends_chunk=True)])
    judge_records(path, lambda _: rf"\boxed{{{answer}}}", "big", 1, rounded=rounded)
    (judged,) = read_records(path)
    assert judged.choices == ("1/2", "1/3")
    assert judged.samples[0].judge == Verdict("big", rf"\boxed{{{answer}}}", right)


def test_a_damaged_journal_is_named(path: Path) -> None:
    journal = path.with_suffix(".verdicts.jsonl")
    journal.write_text(json.dumps(["p1", 0, {"model": "big"}]) + "\n")
    with pytest.raises(ValueError, match=r"evaluate\.verdicts\.jsonl holds a damaged line"):
        judge_records(path, str, "big", 1)
