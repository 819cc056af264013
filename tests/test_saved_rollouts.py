"""Saved rollouts come back to the bit, wrong ones are named, and grading beside the engine changes no reward."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_sr1.config import RewardsConfig
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.ranks import ALONE, Exchange, OneRank
from megatron_sr1.rewards import RewardError, Ungraded, score_group, workers
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.streams import PRESETS
from megatron_sr1.training import rollout_writer
from megatron_sr1.training.ledger import StepLedger
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.recorder import Recorder
from megatron_sr1.training.rollout_files import (
    read_text,
    rollouts_file,
    step_files,
    step_lines,
    steps_in,
    write_rollouts,
)
from megatron_sr1.training.rollout_reader import read_rollouts
from megatron_sr1.training.rollout_writer import RolloutWriter
from megatron_sr1.training.saved_rollouts import SavedRollouts
from megatron_sr1.training.step_rewards import scored_rewards
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair, Sampling
from tests.step_cases import Listed, recorder, rollouts_of, scored
from tests.thread_ranks import on_threads

PRESET = PRESETS["vision_sr1"]
COMPONENTS = scored_rewards(PRESET)
IMAGE = Image.new("RGB", (28, 28))
SECOND = r"<think> 3 + 7 = 10 </think> \boxed{10}"


def rollout(text: str, name: str, logprob: float = -0.1) -> Rollout:
    return Rollout(name, (1, 2), (3, 4), text, (logprob, -1e-30), "stop", 5, 0.25, 1.5)


def pair(sample: int, answer: str, described: bool = True, logprob: float = -0.1) -> RolloutPair:
    block = "<description> The digits are 3 7 . </description> " if described else ""
    first = rollout(block + rf"<think> t </think> \boxed{{{answer}}}", f"0/p/{sample}/first", logprob)
    if not described:
        return RolloutPair(sample, first, None, None)
    return RolloutPair(sample, first, rollout(SECOND, f"0/p/{sample}/second"), "The digits are 3 7 .", sample == 0)


def groups(num: int = 3, logprob: float = -0.1) -> list[RolloutGroup]:
    prompts = [Prompt(f"p{index}", "What is the sum of all digits?", "10", (IMAGE,)) for index in range(num)]
    pairs = [
        (pair(0, "10", logprob=logprob), pair(1, "9" if i else r"\frac{20}{2}", described=i > 0)) for i in range(num)
    ]
    return [RolloutGroup(i, prompt, share) for i, (prompt, share) in enumerate(zip(prompts, pairs, strict=True))]


def save(folder: Path, made: list[RolloutGroup], step: int = 0) -> StepRollouts:
    step_rollouts = rollouts_of(made, None, PRESET)
    write_rollouts(rollouts_file(folder, step), step_rollouts, len(made))
    return step_rollouts


def saved(folder: Path, prompts: Any, step: int = 0, clock: Clock | None = None) -> StepRollouts:
    """As it is read again."""
    return SavedRollouts(folder, recorder(PRESET, 2), ALONE).take(prompts, step, clock or Clock())


def same(ours: StepLedger, theirs: StepLedger) -> bool:
    """To the bit, whoever holds what."""
    held = [replace(each, holder=each.holder * 0).as_rows() for each in (ours, theirs)]
    return (
        torch.equal(*(torch.nan_to_num(rows, nan=-7.0) for rows in held))
        and ours.rewards.keys() == theirs.rewards.keys()
    )


# ---------------------------------------------------------------- files
def test_a_step_comes_back_whole(tmp_path: Path) -> None:
    made = groups()
    before = save(tmp_path, made, step=7)
    clock = Clock()
    rollouts = saved(tmp_path, Listed.of(made), 7, clock)
    (ledger, places), found = rollouts.trained, rollouts.groups
    assert found == made and places == rollouts.places == [0, 1, 2] and rollouts.rounds is None
    assert found[0].pairs[0].description_cut and found[0].pairs[0].first.finished_at == 1.5
    assert same(ledger, before.ledger) and ledger.seconds[0, 0].tolist() == [1.25, 1.25]
    for number, tracks in before.tracks.items():
        for place, track in tracks.items():
            pairs = zip(vars(track).values(), vars(rollouts.tracks[number][place]).values(), strict=True)
            assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    assert clock.seconds.keys() == {"seconds/rollout"}


@settings(deadline=None)
@given(st.floats(-200.0, 0.0))
def test_log_probs_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, logprob: float) -> None:
    made = groups(1, logprob)
    folder = tmp_path_factory.mktemp("bits")
    write_rollouts(rollouts_file(folder, 0), rollouts_of(made, {}, PRESET), 1)
    found = read_rollouts(rollouts_file(folder, 0), lambda further: Listed.of(made), 2, COMPONENTS).groups
    assert found[0].pairs[0].first.generator_logprobs[0].hex() == logprob.hex()


def plain(path: Path) -> list[str]:
    """A step in one file without compression, as earlier releases wrote it; its lines."""
    texts = [read_text(file) for file in step_files(path)]
    for file in step_files(path):
        file.unlink()
    path.write_text("".join(texts))
    return path.read_text().splitlines()


def spoil(path: Path, **changes: Any) -> None:
    lines = [json.loads(line) for line in plain(path)]
    lines[2] = lines[2] | changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    made = groups()
    save(tmp_path, made)
    path, prompts = rollouts_file(tmp_path, 0), [group.prompt for group in made]
    with pytest.raises(ValueError, match=r"step_000001.jsonl does not exist.*train.steps"):
        saved(tmp_path, Listed(prompts), 1)
    with pytest.raises(ValueError, match=r"holds 6 samples.*3 prompts x 4.*samples_per_prompt"):
        read_rollouts(path, lambda further: Listed(prompts), 4, COMPONENTS)
    with pytest.raises(ValueError, match=r"group 0: rollouts of sample 'p0', but the data gives 'p1'"):
        read_rollouts(path, lambda further: Listed(prompts[::-1][1:] + prompts[:1]), 2, COMPONENTS)
    with pytest.raises(ValueError, match=r"no reward 'fmt_cot'.*objective.preset"):
        read_rollouts(path, lambda further: Listed(prompts), 2, ["acc", "fmt_cot"])
    first = step_lines(path)[2]["first"]
    spoil(path, first=first | {"generator_logprobs": [-0.5]})
    with pytest.raises(ValueError, match=r"0/p/0/first: 2 response ids and 1 log-probs"):
        read_rollouts(path, lambda further: Listed(prompts), 2, COMPONENTS)


def split(folder: Path, made: list[RolloutGroup], *shares: set[int]) -> Path:
    """A step whose groups several engines have made."""
    path, whole = rollouts_file(folder, 0), rollouts_of(made, None, PRESET)
    holder = torch.tensor(
        [[2 * rank for rank, share in enumerate(shares) if group.group_id in share] for group in made]
    )
    ledger = replace(whole.ledger, holder=holder.flatten())
    for rank, share in enumerate(shares):
        own = [group for group in made if group.group_id in share]
        write_rollouts(path, replace(whole, ledger=ledger, groups=own), len(made), rank=2 * rank)
    return path


def test_the_parts_of_all_engines_are_the_step(tmp_path: Path) -> None:
    made = groups(5)
    path = split(tmp_path / "split", made, {0, 3}, {4, 1}, {2})
    assert [file.name for file in step_files(path)] == [f"step_000000.{part}-of-3.jsonl.gz" for part in range(3)]
    save(tmp_path / "whole", made)
    assert step_lines(path) == step_lines(rollouts_file(tmp_path / "whole", 0))
    for folder in ("split", "whole"):
        assert saved(tmp_path / folder, Listed.of(made)).groups == made
        assert steps_in(tmp_path / folder) == [rollouts_file(tmp_path / folder, 0)]


def test_each_rank_reads_every_so_many_of_the_files(tmp_path: Path) -> None:
    """Whatever the number of ranks that read what five engines wrote; a mistake in any file is every rank's."""
    made = groups(5)
    path = split(tmp_path, made, {0}, {3}, {4}, {1}, {2})
    whole = saved(tmp_path, Listed.of(made))

    def take(ranks: Exchange) -> StepRollouts:
        return SavedRollouts(tmp_path, recorder(PRESET, 2), ranks).take(Listed.of(made), 0, Clock())

    for num_ranks in (1, 2, 3, 7):
        found = on_threads(num_ranks, take)
        held = [[group.group_id for group in each.groups] for each in found]
        assert sorted(number for numbers in held for number in numbers) == [0, 1, 2, 3, 4] and max(map(len, held)) == -(
            -5 // num_ranks
        )
        for rank, each in enumerate(found):
            assert same(each.ledger, whole.ledger) and each.tracks.keys() == set(held[rank])
            assert each.ledger.number[each.ledger.holder == rank].tolist() == sorted(held[rank])
    file = step_files(path)[3]
    file.write_bytes(file.read_bytes()[:20])

    def refusal(ranks: Exchange) -> str:
        with pytest.raises(ValueError) as error:
            take(ranks)
        return str(error.value)

    assert all("step_000000.3-of-5.jsonl.gz" in text for text in on_threads(2, refusal))


def test_another_run_of_a_step_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    """With more engines, fewer or as many, one that was killed while it wrote, and an earlier release's one file."""
    made, sampling = groups(3), Sampling(2, 1.0, 10, 0)
    for shares in (({0}, {1}, {2}), ({0, 2}, {1}), ({0, 1, 2},)):
        rollouts_file(tmp_path, 0).write_text("of an earlier release")
        split(tmp_path, made, *shares)
        (tmp_path / "step_000000.5-of-7.jsonl.gz.tmp").write_text("")
        with LiveRollouts(Handing(made), sampling, recorder(PRESET, 2), RewardsConfig(), ALONE, tmp_path) as live:
            live.take(Listed.of(made), 0, Clock())
        assert [file.name for file in tmp_path.iterdir()] == ["step_000000.0-of-1.jsonl.gz"]
        assert saved(tmp_path, Listed.of(made)).groups == made
    (tmp_path / "step_000001.0-of-2.jsonl.gz.tmp").write_text("")
    assert steps_in(tmp_path) == [rollouts_file(tmp_path, 0)]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_part_that_is_missing_or_cut_is_named(missing: int, tmp_path: Path) -> None:
    made = groups(3)
    file = step_files(split(tmp_path, made, {0}, {1}, {2}))[missing]
    data = file.read_bytes()
    for cut in (len(data) // 2, 0):
        file.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=rf"step_000000\.{missing}-of-3\.jsonl\.gz: .*damaged: copy it again"):
            saved(tmp_path, Listed.of(made))
    file.unlink()
    with pytest.raises(ValueError, match=r"its parts are .*, which are not all of one run"):
        saved(tmp_path, Listed.of(made))


def test_the_writer_works_beside_and_tells_its_error_to_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, whole = RolloutWriter(PRESET.asked, PRESET.passes.later), rollouts_of(groups(3), None, PRESET)
    may_write = threading.Event()
    monkeypatch.setattr(rollout_writer, "write_rollouts", lambda *args: (may_write.wait(30), write_rollouts(*args)))
    writer.write(rollouts_file(tmp_path, 0), whole, 3, 0)
    assert list(tmp_path.glob("*.gz")) == [], "it has not waited"
    may_write.set()
    writer.settle()
    assert len(list(tmp_path.glob("*.gz"))) == 1
    (tmp_path / "file").write_text("")
    writer.write(rollouts_file(tmp_path / "file", 1), whole, 3, 0)
    with pytest.raises(OSError, match="file"):
        writer.settle()
    writer.settle()
    writer.close()


# ---------------------------------------------------------------- grading beside the engine
class Handing:
    """A generator that hands its groups on in another order than they are asked for."""

    def __init__(self, made: list[RolloutGroup]) -> None:
        self._made = made
        self.log: list[str] = []

    def generate(
        self, prompts: Any, sampling: Any, step: int, on_group: Any = None, on_question: Any = None
    ) -> list[RolloutGroup]:
        for group in reversed(self._made):
            on_group(group)
        return self._made

    def update_weights(self, weights: Any, version: int) -> None:
        self.log.append(f"version {version}")

    def sleep(self) -> None:
        self.log.append("sleep")


OF_ONE_ENGINE = OneRank(0, 2)  # two ranks of which the first holds what their engine makes, seen from there


@pytest.mark.parametrize("end", ['{"key": "tor', "[" * 100_000, "3"])
def test_a_torn_file_is_named_with_its_line(end: str, tmp_path: Path) -> None:
    made = groups()
    save(tmp_path, made, step=0)
    path = rollouts_file(tmp_path, 0)
    lines = plain(path)
    path.write_text("\n".join([*lines[:-1], end]))
    with pytest.raises(ValueError, match=rf"step_000000\.jsonl, line {len(lines)}: .*damaged: copy it again"):
        read_rollouts(path, lambda further: Listed.of(made), 2, ())


def test_rewards_from_workers_are_those_of_this_process(tmp_path: Path) -> None:
    """In the order of groups and samples, whatever the order of completion; across two steps; LaTeX included."""
    sampling = Sampling(2, 1.0, 10, 0)
    for made in (groups(3), groups(2)):
        with LiveRollouts(
            Handing(made), sampling, recorder(PRESET, 2), RewardsConfig(), OF_ONE_ENGINE, tmp_path
        ) as live:
            clock = Clock()
            for step in range(2):
                found = live.take(Listed.of(made), step, clock)
            assert found.groups == made and same(found.trained[0], scored(made, PRESET)), "nothing is left over"
            assert clock.seconds.keys() == {"seconds/rollout", "seconds/reward"}
        again = saved(tmp_path, Listed.of(made), 1)
        assert again.groups == made and same(again.ledger, found.ledger)


def test_engines_sleep_from_a_step_to_the_weights_that_follow_it(tmp_path: Path) -> None:
    """Where none follow they stay awake, for nothing would wake them."""
    sampling, made = Sampling(2, 1.0, 10, 0), groups(1)
    for refreshed, log in ((True, ["sleep", "version 4"]), (False, [])):
        engine = Handing(made)
        with LiveRollouts(
            engine, sampling, recorder(PRESET, 2), RewardsConfig(), ALONE, tmp_path, refreshed=refreshed
        ) as live:
            live.take(Listed.of(made), 3, Clock())
            if refreshed:
                live.refresh([], 4)
        assert engine.log == log


def test_graders_of_an_unknown_reward_are_not_made() -> None:
    with pytest.raises(ValueError, match="no_such_reward"):
        Graders(["acc", "no_such_reward"])


class Failing(Handing):
    """Its first group has a prompt whose facts are none."""

    def generate(self, prompts: Any, sampling: Any, step: int, on_group: Any = None, on_question: Any = None) -> Any:
        first, *others = self._made
        broken = replace(first, prompt=replace(first.prompt, metadata={"facts": "3"}))
        for group in (broken, *others):
            on_group(group)
        return [broken, *others]


def test_a_group_that_cannot_be_graded_ends_the_step_on_every_rank_or_is_skipped(tmp_path: Path) -> None:
    sampling, made = Sampling(2, 1.0, 10, 0), groups(3)
    words = r"'leak' failed on response 0 to sample 'p0' at .*components.py:\d+ in leak: ValueError: metadata"
    engine = Failing(made)
    with LiveRollouts(engine, sampling, recorder(PRESET, 2), RewardsConfig(), OF_ONE_ENGINE, tmp_path) as live:
        with pytest.raises(RewardError, match=words):
            live.take(Listed.of(made), 0, Clock())
        assert engine.log == ["sleep"], "the trainer may save"
    skips = RewardsConfig(on_error="skip_group")
    with LiveRollouts(Failing(made), sampling, recorder(PRESET, 2), skips, OF_ONE_ENGINE, tmp_path) as live:
        kept = live.take(Listed.of(made), 1, Clock())
    assert kept.groups == made[1:] and same(kept.trained[0], scored(made[1:], PRESET))
    again = saved(tmp_path, Listed.of(made), 1)
    assert again.groups == made[1:] and same(again.ledger, kept.ledger)
    with (
        LiveRollouts(Failing(made[:1]), sampling, recorder(PRESET, 2), skips, ALONE, tmp_path) as live,
        pytest.raises(RewardError, match="no group of step 3 could be graded"),
    ):
        live.take(Listed.of(made[:1]), 2, Clock())


def test_spans_that_fail_end_the_step_as_a_reward_does_on_every_rank(tmp_path: Path) -> None:
    """The run is saved then, and needs the engines' memory."""
    made, engines = groups(2), [Handing(groups(2)[:1]), Handing(groups(2)[1:])]

    def masks(response: Any) -> torch.Tensor:
        if response.prompt.key == "p1":
            raise RewardError("the spans of 'mine.py:f' failed")
        return torch.zeros(len(PRESET.streams), len(response.rollout.response_ids))

    def one(ranks: Exchange) -> str:
        failing, engine = Recorder(PRESET, 2, masks, 2), engines[ranks.rank]
        with (
            LiveRollouts(engine, Sampling(2, 1.0, 10, 0), failing, RewardsConfig(), ranks, tmp_path) as live,
            pytest.raises(RewardError, match=r"mine\.py:f") as error,
        ):
            live.take(Listed.of(made), 0, Clock())
        return str(error.value)

    assert len(set(on_threads(2, one))) == 1 and [engine.log for engine in engines] == [["sleep"]] * 2


def kill_grader(graders: Graders) -> int:
    """Of the one that has started."""
    (process_id,) = [worker._process_id for worker in graders._workers if worker._process_id]
    os.kill(process_id, signal.SIGKILL)
    return process_id


def test_a_killed_grader_is_replaced_and_the_rewards_are_the_same(caplog: pytest.LogCaptureFixture) -> None:
    graders = Graders(COMPONENTS, num_workers=1)
    for number in range(2):
        for group in groups():
            graders.submit(group)
        graded = graders.collect()
        assert graded == [(group.group_id, score_group(group, COMPONENTS)) for group in groups()]
        if number == 0:
            kill_grader(graders)
    assert "another takes over" in caplog.text
    graders.close()


SLOW = """
import time
from pathlib import Path
def slow(pair, prompt):
    while not Path({go!r}).exists():
        time.sleep(0.01)
    return 1.0
"""


def test_a_grader_that_takes_too_long_is_replaced_and_named(tmp_path: Path) -> None:
    file, go = tmp_path / "mine.py", tmp_path / "go"
    file.write_text(SLOW.format(go=str(go)))
    with closing(Graders(["acc", f"{file}:slow"], 0.2, num_workers=1)) as graders:
        graders.submit(groups(1)[0])
        ((_, ungraded),) = graders.collect()
        assert isinstance(ungraded, Ungraded) and "of sample 'p0' ended 2 grading processes" in ungraded.reason
        (worker,) = graders._workers
        assert worker._process_id == 0, "the last one is gone, too"
        go.write_text("")
        worker._seconds = 60.0
        graders.submit(groups(1)[0])
        ((_, vectors),) = graders.collect()
        assert not isinstance(vectors, Ungraded) and [vector["acc"] for vector in vectors] == [1.0, 1.0]


def test_several_graders_work_at_once() -> None:
    assert 2 <= workers.default_num_workers() <= 4
    graders = Graders(["acc"], num_workers=2)
    for group in groups(12):
        graders.submit(group)
    assert [group_id for group_id, _ in graders.collect()] == list(range(12))
    process_ids = {worker._process_id for worker in graders._workers}
    assert len(process_ids) == 2 and 0 not in process_ids
    graders.close()
    assert not any(Path(f"/proc/{process_id}").exists() for process_id in process_ids)


PARENT = """
import os
import sys
import time
from megatron_sr1.rewards.workers import Graders
from megatron_sr1.ranks import ALONE
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair
if __name__ == "__main__":
    graders = Graders(["acc", sys.argv[1]])
    first = Rollout("0/p/0/first", (1,), (2,), "<think> t </think> \\\\boxed{10}", (-0.1,), "stop", 0)
    graders.submit(RolloutGroup(0, Prompt("p", "?", "10"), (RolloutPair(0, first, None, None),)))
    (_, (vector,)), = graders.collect()
    assert vector["acc"] == 1.0
    child = int(vector[sys.argv[1]])
    (worker,) = [worker._process_id for worker in graders._workers if worker._process_id]
    if os.fork() == 0:  # holds open every pipe of the rank, as a writer of checkpoints does
        print(worker, os.getpid(), child, flush=True)
        time.sleep(100)
    time.sleep(100)
"""


CHILD = """
import os, time
def child(pair, prompt):
    process_id = os.fork()
    if process_id == 0:
        time.sleep(100)
    return process_id
"""


def test_workers_are_light_and_end_with_a_killed_rank(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    (tmp_path / "own.py").write_text(CHILD)
    repository = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    parent = subprocess.Popen(
        [sys.executable, str(script), f"{tmp_path}/own.py:child"], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    worker, fork, child = map(int, parent.stdout.readline().split())
    assert "torch" not in Path(f"/proc/{worker}/maps").read_text(), "workers stay light"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, (worker, child))) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(fork, signal.SIGKILL)
    assert not is_running(worker) and not is_running(child), "nor does what a reward has started"


def is_running(process_id: int) -> bool:
    return psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
