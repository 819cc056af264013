"""Sweeps for real: three seeds on the digits, one run killed and one failing, then the rest of it; and how runs are
started, followed and stopped, with a stand-in for the command."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_sr1.cli import main
from tests.workspace import REPOSITORY, RUN_TIMEOUT, Workspace

SEEDS, STEPS = (1, 2, 3), 3
NAMES = [f"see_think-seed{seed}" for seed in SEEDS]


def wait_for(condition: Callable[[], bool], seconds: float = RUN_TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# ---------------------------------------------------------------- real runs
@pytest.fixture(scope="module")
def sweep_file(workspace: Workspace) -> Path:
    """Three steps of few and short rollouts, on one rank."""
    command = workspace.command("grpo", "unused")
    overrides = [word for word in command[5:] if not word.startswith("run_dir=")]
    small = ["nproc=1", "layout.tensor=1", "evaluate.examples=1", "evaluate.max_prompts=4", f"train.steps={STEPS}"]
    tree = {
        "command": "grpo",
        "config": command[4],
        "run_dir": str(workspace.folder / "killed_sweep" / "runs"),
        "presets": ["see_think"],
        "seeds": list(SEEDS),
        "overrides": [*overrides, *small, "train.save_every=1", "rollout.prompts_per_step=2", "train.batch_size=2"],
    }
    path = workspace.folder / "killed_sweep" / "sweep.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(tree))
    return path


def sweep_command(path: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_sr1.cli", "sweep", str(path), *words]


def kill_run(sweep: subprocess.Popen[str], name: str) -> None:
    """Kills the process of one run, as a machine that runs out of memory would."""
    for process in psutil.Process(sweep.pid).children():
        if any(word.endswith(f"/{name}") for word in process.cmdline()):
            process.kill()
            return
    raise AssertionError(f"{name} is not running")


def test_a_sweep_with_a_killed_and_a_failing_run_continues_with_these(sweep_file: Path) -> None:
    folder = sweep_file.parent / "runs"
    killed, finished, failing = NAMES
    (folder / failing).mkdir(parents=True)
    with (folder / failing / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the run finds its folder in use
        sweep = subprocess.Popen(
            sweep_command(sweep_file, "--jobs", "2"),
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        wait_for(lambda: (folder / killed / "checkpoints" / "step_000001").exists() or sweep.poll() is not None)
        kill_run(sweep, killed)
        printed, _ = sweep.communicate(timeout=RUN_TIMEOUT)
    assert sweep.returncode == 1, printed[-4000:]
    last = printed.strip().splitlines()[-1]
    assert f"{killed} (status -9, see {folder / killed}.log)" in last and f"{failing} (status" in last
    assert finished not in last
    assert "is in use by another process" in (folder / f"{failing}.log").read_text()
    assert f"{finished} | step {STEPS}/{STEPS}" in printed, "what a run prints is shown with its name"
    done = (folder / finished / "hf" / "model.safetensors").stat().st_mtime_ns

    again = subprocess.run(sweep_command(sweep_file, "--jobs", "2"), cwd=REPOSITORY, text=True, capture_output=True)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert f"{killed} (started)" in again.stdout and f"{finished} (finished)" in again.stdout
    assert f"{killed} | continuing after step" in again.stdout
    assert f"{finished} |" not in again.stdout
    assert done == (folder / finished / "hf" / "model.safetensors").stat().st_mtime_ns
    for name in NAMES:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(STEPS)), name

    check_report(folder)


def check_report(folder: Path) -> None:
    """The table against the runs' own files."""
    (group,) = json.loads((folder / "sweep.json").read_text())
    summaries = [json.loads((folder / name / "eval" / "after.json").read_text())["summary"] for name in NAMES]
    accuracies = [summary["accuracy"] for summary in summaries]
    found = group["after"]["accuracy"]
    assert (group["group"], found["num"], group["unfinished"]) == ("see_think", len(NAMES), [])
    assert found["mean"] == pytest.approx(statistics.mean(accuracies))
    assert found["std"] == pytest.approx(statistics.stdev(accuracies))


def test_a_finished_sweep_is_only_reported(
    sweep_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    folder = sweep_file.parent / "runs"
    logs = {name: (folder / f"{name}.log").stat().st_size for name in NAMES}
    for command in ("sweep", "report"):
        (folder / "report.html").unlink()
        main([command, str(sweep_file)])
        assert "see_think" in capsys.readouterr().out and (folder / "report.html").is_file()
    assert logs == {name: (folder / f"{name}.log").stat().st_size for name in NAMES}


# ---------------------------------------------------------------- a stand-in for the command
STAND_IN = """#!/bin/sh
# called like python -m megatron_sr1.cli grpo CONFIG key=value ...; the last word is run_dir=FOLDER
for word; do folder=${word#run_dir=}; done
trap 'echo asked to stop; exit 75' TERM
mkdir -p "$folder"
now=$(date +%s.%N)  # before the file is there: a run beside this one ends when it sees it
echo "$now" > "$folder/began"
echo "hello from $(basename "$folder")"
case "$folder" in
*seed3) exit 7 ;;
*seed9) touch "$folder/waits"; while :; do sleep 0.05; done ;;
esac
# asked for the runs beside it: stays until one of them has begun, or it is clear that none does
for try in $(seq 600); do
    [ -z "$BESIDE" ] || [ -n "$(find "$(dirname "$folder")" -name began ! -path "$folder/*")" ] && break
    sleep 0.05
done
date +%s.%N > "$folder/ended"
"""
DRIVER = """
import sys
from pathlib import Path
from megatron_sr1.launch.sweep import read_sweep, run_here
sys.executable = sys.argv[2]
sweep = read_sweep(Path(sys.argv[1]))
outcomes = run_here(sweep, sweep.runs, int(sys.argv[3]), lambda line: print(line, flush=True))
print([(outcome.run.seed, outcome.status) for outcome in outcomes])
"""


class Driver:
    """Runs seeds of a sweep by `run_here` in another process, with the stand-in as its Python."""

    def __init__(self, folder: Path, seeds: list[int], jobs: int, beside: bool = False) -> None:
        self.folder = folder
        stand_in, sweep = folder / "stand_in.sh", folder / "sweep.yaml"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o700)
        config = str(REPOSITORY / "examples" / "quickstart" / "grpo.yaml")
        sweep.write_text(yaml.safe_dump({"config": config, "run_dir": str(folder / "runs"), "seeds": seeds}))
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(sweep), str(stand_in), str(jobs)],
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"BESIDE": "1" if beside else ""},
        )

    def file(self, seed: int, name: str) -> Path:
        return self.folder / "runs" / f"vision_sr1-seed{seed}" / name

    def time(self, seed: int, name: str) -> float:
        return float(self.file(seed, name).read_text())

    def end(self) -> list[str]:
        printed, _ = self.process.communicate(timeout=60)
        return printed.splitlines()


def test_runs_one_after_another_and_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    driver = Driver(tmp_path, [1, 3, 2], jobs=1)
    printed = driver.end()
    assert printed[-1] == "[(1, 0), (3, 7), (2, 0)]"
    assert driver.time(1, "ended") <= driver.time(3, "began") <= driver.time(2, "began")
    assert "vision_sr1-seed3 | hello from vision_sr1-seed3" in printed
    assert any("vision_sr1-seed3: failed with status 7" in line for line in printed)
    assert (tmp_path / "runs" / "vision_sr1-seed3.log").read_text() == "hello from vision_sr1-seed3\n"


def test_jobs_run_beside_each_other(tmp_path: Path) -> None:
    driver = Driver(tmp_path, [1, 2, 4], jobs=2, beside=True)
    assert driver.end()[-1] == "[(1, 0), (2, 0), (4, 0)]"
    assert driver.time(2, "began") < driver.time(1, "ended") and driver.time(1, "began") < driver.time(2, "ended")
    assert driver.time(4, "began") > min(driver.time(1, "ended"), driver.time(2, "ended"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_goes_to_the_run_and_starts_no_other(tmp_path: Path, number: signal.Signals) -> None:
    driver = Driver(tmp_path, [9, 1], jobs=1)
    wait_for(lambda: driver.file(9, "waits").exists(), 60)
    driver.process.send_signal(number)
    printed = driver.end()
    assert printed[-1] == "[(9, 75), (1, None)]"
    assert "vision_sr1-seed9 | asked to stop" in printed and not driver.file(1, "began").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a child of its parent's death on Linux alone")
def test_runs_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    driver = Driver(tmp_path, [9], jobs=1)
    wait_for(lambda: driver.file(9, "waits").exists(), 60)
    (run,) = psutil.Process(driver.process.pid).children()
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.end()
    wait_for(lambda: not run.is_running() or run.status() == psutil.STATUS_ZOMBIE, 60)
    assert (tmp_path / "runs" / "vision_sr1-seed9.log").read_text().endswith("asked to stop\n")
