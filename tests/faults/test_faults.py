"""The short form of `python -m tests.faults`: a run that is killed twice and whose folder is damaged twice."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

from megatron_sr1.config import saved_steps
from tests.faults.__main__ import BEGIN, END, drawn_faults, table
from tests.faults.chain import Chains, Fault, Trial
from tests.faults.damage import DAMAGES, possible, tear_what_is_written
from tests.faults.moments import PARTS, Moments
from tests.faults.processes import Started
from tests.workspace import REPOSITORY, Workspace

WORDS = (
    *("train.steps=8", "train.save_every=1", "train.evaluate_every=3", "train.keep_best=accuracy"),
    *("train.save_hf=true", "evaluate.verify_export=12"),
)
TORN, LEFT = list(DAMAGES)[3:]


def test_a_run_that_is_killed_and_damaged_ends_in_the_same_bytes(finished: Workspace) -> None:
    """One rank while it grades, and the launcher while a checkpoint is written: the others end, nothing is left of
    them, and the third start ends with the weights, metrics, rollouts and evaluations of the undisturbed run. In how
    many seconds they end is for the trials to measure (`python -m tests.faults`): other tests run beside this one."""
    chains = Chains(finished, "whole", WORDS, Moments(finished, "whole", started_after=5.0), end_seconds=60.0)
    faults = [Fault("reward", "rank", damage=TORN), Fault("save", "launcher", damage=LEFT)]
    trials = chains.disturb("disturbed", faults, random.Random(0))
    assert [trial.wrong for trial in trials] == [(), ()], trials
    assert [(trial.fault, trial.went_on) for trial in trials] == [(fault, False) for fault in faults]
    folder = finished.folder / "disturbed" / "checkpoints"
    said = re.search(r"continuing after step (\d) of 8, (\d+) samples of the data, from (.*)", _log(finished, 2))
    assert said and said.groups() == (said[1], str(4 * int(said[1])), f"{folder}/step_00000{said[1]}")
    (finished.folder / "disturbed" / "hf" / "model.safetensors").write_bytes(b"others")
    (finished.folder / "disturbed" / "eval" / "after.jsonl").unlink()
    assert chains.differences("disturbed") == ("other weights", "other evaluations")


def test_what_ranks_are_forked_from_ends_with_a_launcher_that_dies_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it has imported anything, let alone asked to be told of the launcher's end."""
    (tmp_path / "slow.py").write_text("import time\n\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    code = "from megatron_sr1.platform.fork_server import start_fork_server; start_fork_server(['slow'])"
    started = Started([sys.executable, "-c", code], tmp_path / "log")
    try:
        while not started.roles().get("fork server"):
            assert started.process.poll() is None, started.log.read_text()
        started.process.kill()
        assert started.ended_within(60.0) is not None, started.roles()
    finally:
        started.close()


def _log(workspace: Workspace, attempt: int) -> str:
    return (workspace.folder / f"disturbed.{attempt}.log").read_text()


def test_the_trials_are_drawn_by_the_seed_and_counted_by_kind(tmp_path: Path) -> None:
    def faults(seed: int) -> list[Fault]:
        draw = random.Random(seed)
        return [fault for _ in range(200) for fault in drawn_faults(draw, 3)]

    assert faults(1) == faults(1) != faults(2)
    assert {fault.part for fault in faults(1)} == set(PARTS)
    assert {fault.damage for fault in faults(1)} == {"", *DAMAGES}
    one, other = Fault("save", "rank", damage=LEFT), Fault("train", "rank")
    made = table([Trial("a", one, 2.5), Trial("b", other, 3.0, wrong=("other weights",))])
    assert "| SIGKILL to the rank | 2 | 1 | 3.0 s |\n" in made and f"| {LEFT} | 1 | 1 | 2.5 s |\n" in made
    assert "| during save | 1 | 1 | 2.5 s |\n" in made and made.endswith("| all | 2 | 1 | |\n")
    page = (REPOSITORY / "docs" / "reliability.md").read_text()
    assert page.count(BEGIN) == page.count(END) == 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_checkpoint_is_damaged_where_there_is_another(tmp_path: Path, count: int) -> None:
    for step in range(1, count + 1):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        for name in ("a.distcp", "checksums.json"):
            (folder / name).write_bytes(bytes(100))
    assert list(possible(tmp_path)) == (list(DAMAGES) if count > 1 else [TORN, LEFT])
    for name in possible(tmp_path):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        DAMAGES[name](tmp_path, random.Random(0))
        assert before != {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, name
    assert len(saved_steps(tmp_path / "checkpoints")) == count
    assert DAMAGES[TORN] is tear_what_is_written
