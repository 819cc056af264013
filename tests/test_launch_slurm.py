"""On a real Slurm of one node: an experiment is queued, preempted, saved, requeued, resumed and finished.

Where Slurm is not installed this is skipped; tests/slurm/prove.sh installs it and keeps the output.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.workspace import REPOSITORY, Workspace, untimed

LAUNCH = REPOSITORY / ".venv-launch" / "bin" / "megatron-sr1"
ONE_NODE = REPOSITORY / "tests" / "slurm" / "one_node.sh"
DEADLINE = 300  # seconds
missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"no Slurm here: {', '.join(missing)}; see tests/slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm of one's own needs root"),
    pytest.mark.skipif(not LAUNCH.exists(), reason="no .venv-launch: run make launch-env"),
]


@dataclass(frozen=True)
class Cluster:
    """A Slurm of one node with the partitions low and high."""

    environment: dict[str, str]

    def run(self, *words: str | Path) -> str:
        done = subprocess.run(
            [str(word) for word in words], env=self.environment, text=True, capture_output=True, timeout=DEADLINE
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, happened: Callable[[], bool], *jobs: str) -> None:
        """Says when it has happened; fails with the jobs' state where it does not."""
        start = time.monotonic()
        while not happened():
            assert time.monotonic() - start < DEADLINE, f"{what}: {[self.show(job) for job in jobs]}\n{self.log()}"
            time.sleep(0.2)
        print(f"{what}: {', '.join(self.describe(job) for job in jobs)}")

    def log(self) -> str:
        return Path(self.environment["SLURM_CONF"]).with_name("slurmctld.log").read_text()[-3000:]

    def describe(self, job: str) -> str:
        shown = self.show(job)
        return f"job {job} {shown['JobName']} is {shown['JobState']}, restarts {shown['Restarts']}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run([ONE_NODE, "start", folder], text=True, capture_output=True)
    try:
        assert done.returncode == 0, done.stderr
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        yield Cluster({**plain, "SLURM_CONF": done.stdout.strip(), "A_SECRET": "not to be written"})
    finally:
        subprocess.run([ONE_NODE, "stop", folder], check=True)


def launch(cluster: Cluster, folder: Path, experiment: dict[str, object], **slurm: object) -> dict[str, str]:
    """Queues it from `folder`; the numbers of the jobs by task."""
    file, settings = folder / "experiment.yaml", folder / "settings.yaml"
    file.write_text(yaml.safe_dump(experiment))
    settings.write_text(
        yaml.safe_dump(
            {
                "workdir": str(folder),
                "python": str(REPOSITORY / ".venv/bin/python"),
                "env": ["A_SECRET"],
                "variables": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                "slurm": {"partition": "low", "time": "00:30:00", **slurm},
            }
        )
    )
    printed = cluster.run(LAUNCH, "launch", file, "--executor", "slurm", "--settings", settings)
    print(printed.strip().replace(str(folder), "."))
    lines = [line for line in printed.splitlines() if ": queued as " in line]
    return {line.split(":")[0]: line.split("queued as ")[1].split(";")[0] for line in lines}


def test_a_preempted_run_is_requeued_and_ends_with_the_same_bits(finished: Workspace, cluster: Cluster) -> None:
    grpo = finished.command("grpo", "preempted", "train.steps=8", "train.save_every=100")[4:]
    hf_dir = finished.folder / "preempted" / "hf"
    evaluate = finished.command("evaluate", "judged", f"model.hf_dir={hf_dir}")[4:]
    experiment = {
        "name": "proof",
        "tasks": [
            {"name": "grpo", "command": "grpo", "config": grpo[0], "overrides": grpo[1:]},
            {
                "name": "evaluate",
                "command": "evaluate",
                "config": evaluate[0],
                "overrides": evaluate[1:],
                "after": ["grpo"],
            },
        ],
    }
    jobs = launch(cluster, finished.folder, experiment, tasks_per_node=2)
    run, judged = jobs["grpo"], jobs["evaluate"]
    assert f"afterok:{run}" in cluster.show(judged)["Dependency"]

    metrics = finished.folder / "preempted" / "metrics.jsonl"
    cluster.wait("step 2 is done", lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, run)
    wanted = cluster.run("sbatch", "--parsable", "-p", "high", "-n2", "-o", "/dev/null", "--wrap", "sleep 3").strip()
    cluster.wait("preempted, and back in the queue", lambda: cluster.show(run)["Restarts"] == "1", run, wanted)
    (saved,) = (finished.folder / "preempted" / "checkpoints").iterdir()
    print(f"saved {saved.name}; no step before the last was due to be saved")
    cluster.wait("running again", lambda: cluster.show(run)["JobState"] == "RUNNING", run, wanted, judged)
    cluster.wait("finished", lambda: cluster.show(run)["JobState"] == "COMPLETED", run)
    cluster.wait("evaluated after it", lambda: cluster.show(judged)["JobState"] == "COMPLETED", judged)

    logs = "".join(path.read_text() for path in sorted(finished.folder.glob("runs/launch/**/grpo/*.out")))
    assert "asked to stop: saved after step" in logs and "continuing after step" in logs
    assert untimed(finished.metrics("preempted")) == untimed(finished.metrics("whole"))
    weights = [finished.folder / run / "hf" / "model.safetensors" for run in ("preempted", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert finished.summary("judged", "evaluate") == finished.summary("whole", "after")
    print("metrics and weights are those of the undisturbed run, byte for byte")

    kept = [path for path in (finished.folder / "runs" / "launch").rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if b"not to be written" in path.read_bytes()]


def test_a_cancelled_run_stays_cancelled_and_what_waits_for_it_never_starts(
    workspace: Workspace, cluster: Cluster
) -> None:
    sft = workspace.command("sft", "cancelled", "train.steps=1000", "train.save_every=1000")[4:]
    experiment = {
        "name": "cancel",
        "tasks": [
            {"name": "sft", "command": "sft", "config": sft[0], "overrides": sft[1:]},
            {"name": "report", "command": "report", "arguments": [str(workspace.folder)], "after": ["sft"]},
        ],
    }
    jobs = launch(cluster, workspace.folder, experiment, tasks_per_node=2)
    metrics = workspace.folder / "cancelled" / "metrics.jsonl"
    cluster.wait("step 2 is done", lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, jobs["sft"])
    cluster.run("scancel", jobs["sft"])
    cluster.wait("cancelled", lambda: cluster.show(jobs["sft"])["JobState"] == "CANCELLED", jobs["sft"])
    running = ("squeue", "--noheader", "--states", "RUNNING,COMPLETING", "--format", "%A")
    cluster.wait("saved, and ended", lambda: jobs["sft"] not in cluster.run(*running).split(), jobs["sft"])
    assert cluster.show(jobs["sft"])["Restarts"] == "0" and cluster.show(jobs["sft"])["JobState"] == "CANCELLED"
    assert cluster.show(jobs["report"])["JobState"] == "PENDING"
    assert cluster.show(jobs["report"])["Reason"] in ("Dependency", "DependencyNeverSatisfied")
    cluster.run("scancel", jobs["report"])


def test_a_sweep_is_an_array(workspace: Workspace, cluster: Cluster, tmp_path: Path) -> None:
    """Each element runs its own command; seen by programs that only write down what they were told."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\necho "$SLURM_PROCID $@" >> {tmp_path}/seen-$SLURM_ARRAY_TASK_ID\n')
    program.chmod(0o755)
    sweep = tmp_path / "presets.yaml"
    keys = {"config": str(REPOSITORY / "examples/quickstart/grpo.yaml"), "run_dir": "runs/array"}
    sweep.write_text(yaml.safe_dump({**keys, "presets": ["see_think", "vision_sr1"], "seeds": [1, 2]}))
    words = ["--executor", "slurm", "--set", f"python={program}", "--set", f"workdir={tmp_path}"]
    printed = cluster.run(
        LAUNCH, "launch", sweep, *words, "--set", "slurm.tasks_per_node=2", "--set", "slurm.parallel=1"
    )
    job = printed.split("queued as ")[1].split(";")[0]
    numbers = range(4)
    cluster.wait("all ran", lambda: all((tmp_path / f"seen-{number}").exists() for number in numbers), f"{job}_3")
    seen = [(tmp_path / f"seen-{number}").read_text().splitlines() for number in numbers]
    runs = [(preset, seed) for preset in ("see_think", "vision_sr1") for seed in (1, 2)]
    for lines, (preset, seed) in zip(seen, runs, strict=True):
        assert sorted(line.split()[0] for line in lines) == ["0", "1"], "one line of each of two ranks"
        assert all(f"objective.preset={preset} seed={seed} " in line and "nproc=2" in line for line in lines)
    print(json.dumps({"array": job, "runs": [" ".join(map(str, run)) for run in runs]}))
