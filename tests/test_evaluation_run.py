"""`megatron-sr1 evaluate` for real: vLLM, two passes, text-only prompts, kill -9 and continue, a judge on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_sr1.data import write_shards
from megatron_sr1.evaluation import Record, pass_at_k, read_records, wilson
from megatron_sr1.rewards import grade
from megatron_sr1.types import Prompt

from .commands import ForkedError, run_forked
from .data_cases import QUESTION, write_tar
from .judge_server import JudgeServer, serve
from .workspace import REPOSITORY, Workspace

START_TIMEOUT = 300  # seconds
TEXT = [Prompt(f"text-{n}", f"What is {n} + 1?", str(n + 1), source="text") for n in range(5)]


def _answer(question: str, attempt: int) -> str:
    """Breaks at every first attempt; then gives the number of characters, so that the same question has one answer."""
    return "503" if attempt == 0 else rf"\boxed{{{len(question) % 10}}}"


@dataclass(frozen=True)
class Evaluations:
    """Two benchmarks, one of them a folder that holds a damaged sample, and a judge."""

    workspace: Workspace
    server: JudgeServer

    def words(self, run: str, *overrides: str) -> list[str]:
        folder = self.workspace.folder
        return [
            *self.workspace.command("evaluate", run, "nproc=1", "layout.tensor=1"),
            f"data.heldout=[{folder}/data/heldout-*.tar,{folder}/text]",
            *("data.max_bad_samples=1", "evaluate.samples=2", "evaluate.temperature=1.0", "evaluate.chunk_prompts=4"),
            *("evaluate.examples=6", "evaluate.judge_retries=2", "evaluate.judge_backoff=0.01"),
            *overrides,
        ]

    def run(self, run: str, *overrides: str) -> str:
        """What it printed. It is started for itself only where it is killed, and where it goes on by two ranks."""
        return run_forked(self.words(run, *overrides))

    def judged(self, run: str, *overrides: str) -> list[str]:
        self.server.attempts.clear()
        judge = (f"evaluate.judge_url={self.server.url}", "evaluate.judge_model=counter")
        return self.words(run, *judge, *overrides)

    def file(self, run: str, name: str) -> Path:
        return self.workspace.folder / run / "eval" / name


@pytest.fixture(scope="module")
def evaluations(workspace: Workspace) -> Iterator[Evaluations]:
    write_shards(TEXT, workspace.folder / "text", "text", 3)
    write_tar(workspace.folder / "text" / "x.tar", {"broken.json": QUESTION, "broken.0.png": b"no image"})
    with serve(_answer) as server:
        yield Evaluations(workspace, server)


@pytest.fixture(scope="module")
def whole(evaluations: Evaluations) -> Evaluations:
    """The evaluation `whole`, not interrupted, without a judge."""
    printed = evaluations.run("whole-evaluation")
    assert "answered 17 of 18 prompts" in printed and "By source" in printed
    return evaluations


def _tree(evaluations: Evaluations, run: str) -> dict:
    return json.loads(evaluations.file(run, "evaluate.json").read_text())


def test_records_and_summary_agree(whole: Evaluations) -> None:
    """The summary is counted here a second time, from the texts that the records hold."""
    records = list(read_records(whole.file("whole-evaluation", "evaluate.jsonl")))
    assert [r.key for r in records] == [f"heldout-{n:06d}" for n in range(12)] + [prompt.key for prompt in TEXT]
    assert [r.ends_chunk for r in records] == [n % 4 == 3 or n == 16 for n in range(17)]
    summary, by_source = (_tree(whole, "whole-evaluation")[name] for name in ("summary", "by_source"))
    right = [sum(_right(s.first.text, r) for s in r.samples) for r in records]
    assert summary["accuracy"] == summary["pass@1"] == sum(right) / 34 > 0
    assert summary["pass@2"] == pytest.approx(sum(pass_at_k(2, c, 2) for c in right) / 17)
    seen = [(s, r) for r in records[:12] for s in r.samples]
    shortcuts = [_right(s.first.text, r) and not (s.second and _right(s.second.text, r)) for s, r in seen]
    assert summary["language_shortcut_rate"] == sum(shortcuts) / 24
    assert sum(s.second is not None for s, _ in seen) > 12, "the cold start has taught the layout"
    assert len({s.first.text for s, _ in seen}) > 12, "samples are drawn"
    assert by_source["text"]["second_pass_accuracy"] is None and by_source["text"]["num_prompts"] == 5
    assert all(s.second is None for r in records[12:] for s in r.samples) and records[-1].template == "cot"
    text = wilson(by_source["text"]["format"], 10)
    assert by_source["text"]["format_high"] - by_source["text"]["format_low"] >= text[1] - text[0] - 1e-12
    assert (summary["num_prompts"], summary["num_samples"]) == (17, 34)
    quarantine = whole.workspace.folder / "whole-evaluation" / "quarantine" / "heldout.jsonl"
    assert [json.loads(line)["key"] for line in quarantine.read_text().splitlines()] == ["broken"]


def test_controls_are_asked_of_the_same_samples(whole: Evaluations) -> None:
    """Counted a second time, too; who lends and what is known are those of the data."""
    records = list(read_records(whole.file("whole-evaluation", "evaluate.jsonl")))
    summary = _tree(whole, "whole-evaluation")["summary"]
    seen, same = [(s, r) for r in records[:12] for s in r.samples], []
    assert not any(s.controls for r in records[12:] for s in r.samples)
    for name in ("prior", "shuffled", "gold"):
        answers = [(s.controls[name], r) for s, r in seen]
        assert all(answer.right == _right(answer.response.text, r) for answer, r in answers if answer.response)
        assert summary[f"{name}_accuracy"] == sum(answer.right for answer, _ in answers) / 24
        assert summary[f"{name}_samples"] == 24
    by_key = {r.key: r for r in records}
    for number, (sample, record) in enumerate(seen):
        answer = sample.controls["shuffled"]
        lender = by_key[answer.lent_by]
        assert lender.material is not None and record.material is not None
        assert lender.material.shown != record.material.shown and lender.samples[number % 2].description is not None
        assert answer.same_question == (lender.problem == record.problem)
        same.append(answer.same_question)
    assert summary["shuffled_same_question"] == sum(same) / 24 > 0
    second, prior = summary["second_pass_accuracy"], summary["prior_accuracy"]
    assert summary["sufficiency"] == pytest.approx(second - prior)
    assert len({s.controls["prior"].response for s, _ in seen}) > 2, "samples are drawn"


def _right(text: str, record: Record) -> bool:
    _, box, rest = text.rpartition("\\boxed{")
    return bool(box) and grade(rest.partition("}")[0], record.answer)


def test_killed_and_continued_it_is_the_same_to_the_bit(whole: Evaluations) -> None:
    """Killed after the first records and continued by two engines; then both are judged, one of them with its answers
    complete, which needs no engine. Records and summaries are equal, byte for byte."""
    log = (whole.workspace.folder / "killed-evaluation.log").open("w")
    words = whole.words("killed-evaluation", "rollout.max_running_requests=2")
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
    records = whole.file("killed-evaluation", "evaluate.jsonl")
    part, deadline = records.parent / "parts" / "evaluate" / "00000.jsonl", time.monotonic() + START_TIMEOUT
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    uninterrupted = whole.file("whole-evaluation", "evaluate.jsonl")
    count = len(part.read_bytes().splitlines())
    assert 0 < count < 17 and not records.exists(), Path(log.name).read_text()[-4000:]
    with part.open("ab") as file:
        file.write(b'{"index": 16, "record": {"key": "torn')

    two = ("nproc=2", "rollout.pull=true", "rollout.max_running_requests=2")
    words = whole.judged("killed-evaluation", *two)
    continued = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert continued.returncode == 0, continued.stdout[-2000:] + continued.stderr[-4000:]
    assert "answered 17 of 18 prompts" in continued.stdout and not part.parent.exists()
    printed = run_forked(whole.judged("whole-evaluation"))
    assert "answered" not in printed and "vllm" not in printed.lower(), f"no engine is needed: {printed[-4000:]}"
    assert records.read_bytes() == uninterrupted.read_bytes()
    names = [whole.file(run, "evaluate.json") for run in ("killed-evaluation", "whole-evaluation")]
    assert names[0].read_bytes() == names[1].read_bytes()

    descriptions = [s.description for r in read_records(records) for s in r.samples if s.description is not None]
    assert sum(whole.server.attempts.values()) >= len(set(descriptions)) and "are missing" not in printed
    summary = _tree(whole, "whole-evaluation")["summary"]
    assert summary["judge_missing"] == 0 and summary["judged_accuracy"] is not None


def test_one_that_an_earlier_release_left_goes_on(whole: Evaluations) -> None:
    """Its file of records ends after the second chunk of four."""
    uninterrupted = whole.file("whole-evaluation", "evaluate.jsonl")
    records = whole.file("earlier-evaluation", "evaluate.jsonl")
    shutil.copytree(uninterrupted.parent, records.parent)
    records.with_suffix(".json").unlink()
    lines = uninterrupted.read_bytes().splitlines(keepends=True)
    records.write_bytes(b"".join(lines[:8]) + lines[8][:50])
    printed = whole.run("earlier-evaluation")
    assert "answered 12 of 18 prompts" in printed and "answered 4 of" not in printed
    found, wanted = (list(read_records(path)) for path in (records, uninterrupted))
    assert [_unjudged(record) for record in found] == [_unjudged(record) for record in wanted] and len(found) == 17


def _unjudged(record: Record) -> Record:
    return replace(record, samples=tuple(replace(sample, judge=None) for sample in record.samples))


def test_another_evaluation_is_not_continued(whole: Evaluations) -> None:
    before = whole.file("whole-evaluation", "evaluate.jsonl").read_bytes()
    with pytest.raises(ForkedError) as refused:
        whole.run("whole-evaluation", "seed=2", "model.max_pixels=30000", "evaluate.chunk_prompts=5")
    said = "seed was 1 and is 2; evaluate.chunk_prompts was 4 and is 5; model.max_pixels was None and is 30000."
    assert said in str(refused.value)
    assert "--restart" in refused.value.printed.splitlines()[-1]
    assert whole.file("whole-evaluation", "evaluate.jsonl").read_bytes() == before
