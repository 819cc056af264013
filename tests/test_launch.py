"""Experiments and settings as files, the scripts they become, and a sweep through NeMo-Run's local executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sr1.cli import main
from megatron_sr1.config import Config, ConfigError
from megatron_sr1.launch.experiment import Experiment, Step, Task, read_experiment
from megatron_sr1.launch.ranks import first_node, slurm_ranks, started_rank
from megatron_sr1.launch.script import STOPPED_STATUS, local_script
from megatron_sr1.launch.settings import LaunchSettings, load_settings
from megatron_sr1.launch.submit import doubts
from tests.workspace import REPOSITORY, Workspace

LAUNCH = REPOSITORY / ".venv-launch" / "bin" / "megatron-sr1"
QUICKSTART = str(REPOSITORY / "examples/quickstart/grpo.yaml")
needs_nemo_run = pytest.mark.skipif(not LAUNCH.exists(), reason="no .venv-launch: run make launch-env")


def write(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


# ---------------------------------------------------------------- settings
def test_hours_without_quotes_are_no_minutes() -> None:
    """YAML would make 43200 of them, and Slurm a month."""
    with pytest.raises(ConfigError, match=r"12:00:00 without quotes is a number in YAML.*quotes"):
        load_settings(None, ["slurm.time=12:00:00"])
    assert load_settings(None, ["slurm.time='12:00:00'"]).slurm.time == "12:00:00"
    for limit in ("90", "1-12", "2-00:30:00", "UNLIMITED"):
        assert load_settings(None, [f"slurm.time={limit}"]).slurm.time == limit


def test_paths_of_the_settings_may_begin_with_the_user_s_folder() -> None:
    settings = load_settings(None, ["workdir='~'", "python=~/bin/python", "logs=~/logs"])
    assert (settings.folder, settings.log_folder) == (Path.home().resolve(), Path.home().resolve() / "logs")
    assert settings.program == str(Path.home() / "bin/python")


def test_a_dry_run_doubts_a_python_that_is_not_there_and_no_gpus() -> None:
    task = Task("a", (Step("a", "grpo", ("x.yaml",)),))
    for overrides, words in (
        (["python=/no/python", "executor=slurm"], ["python='/no/python' is no program", "slurm.gpus_per_node"]),
        ([f"python={sys.executable}", "executor=slurm", "slurm.gpus_per_node=8"], []),
        ([f"python={sys.executable}", "executor=slurm", "slurm.extra.gres=gpu:8"], []),
        (["executor=docker", "container.image=x", "container.gpus=0"], ["container.gpus=0"]),
        ([f"python={sys.executable}"], []),
    ):
        found = doubts(Experiment("e", (task,)), load_settings(None, overrides))
        assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True)), found
    convert = Task("a", (Step("a", "convert", ()),))
    settings = load_settings(None, [f"python={sys.executable}", "executor=slurm"])
    assert not doubts(Experiment("e", (convert,)), settings), "it needs none"


# ---------------------------------------------------------------- ranks of srun
STEP = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def test_srun_s_tasks_are_ranks() -> None:
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "node07", "MASTER_PORT": "24243"}
    assert slurm_ranks(STEP) == expected
    same = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert {slurm_ranks(same)[name] for name in ("MASTER_ADDR", "MASTER_PORT")} == {"node07", "24243"}
    own = slurm_ranks({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "999"})
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("10.0.0.1", "999")


RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("variables", "ranks"), [(RANK, 1), (STEP, 16), ({**STEP, **RANK}, 1)])
def test_a_started_rank_has_the_number_of_ranks_of_its_environment(variables: dict[str, str], ranks: int) -> None:
    started = started_rank(variables)
    assert started is not None and started.num_ranks == ranks
    started.check(Config(nproc=ranks))
    name = "WORLD_SIZE" if "RANK" in variables else "SLURM_STEP_NUM_TASKS"
    with pytest.raises(ConfigError, match=f"{name}={ranks} in the environment contradicts nproc=2:.*env -u RANK"):
        started.check(Config(nproc=2))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        *(({n: v for n, v in RANK.items() if n != name}, [f"{name} is not set, but"]) for name in RANK),
        *(
            ({n: v for n, v in STEP.items() if n != name}, [f"{name} is not set, but SLURM_STEP_NUM_TASKS=16 is"])
            for name in STEP
            if name != "SLURM_STEP_NUM_TASKS"
        ),
        ({"RANK": "0"}, ["WORLD_SIZE is not set, but RANK=0 is"]),
        ({**RANK, "RANK": "1"}, ["RANK='1'", "from 0 to 0"]),
        ({**RANK, "RANK": "-1"}, ["RANK='-1'"]),
        ({**RANK, "WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
        ({**RANK, "MASTER_PORT": "99999"}, ["MASTER_PORT='99999'", "65535"]),
        ({**STEP, "SLURM_PROCID": "16"}, ["RANK='16'", "from 0 to 15"]),
        ({**STEP, "SLURM_STEP_NUM_TASKS": ""}, ["SLURM_STEP_NUM_TASKS=''"]),
        *(({**RANK, name: ""}, [f"{name} is not set, but"]) for name in RANK),
        ({**STEP, "RANK": "", "SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST is not set"]),
    ],
)
def test_half_an_environment_names_the_variable(variables: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        started_rank(variables)
    assert "\n" not in str(caught.value) and "env -u RANK" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_process_of_mpirun_is_not_the_whole_run(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=2 in the environment: mpirun.*torchrun or srun"):
        started_rank({name: "2"})
    assert started_rank({name: "1"}) is None
    assert started_rank({name: "16", **STEP}) is not None, "srun names the ranks itself"


@pytest.mark.parametrize("environment", [{}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {**STEP, "RANK": "3"}])
def test_other_processes_are_not(environment: dict[str, str]) -> None:
    """No Slurm; one task, which starts its ranks itself; torchrun inside a step."""
    assert slurm_ranks(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("vm", "vm"), ("a,b", "a"), ("node[1-4]", "node1"), ("n[007,009-12],x[1-2]", "n007"), ("r[1-2]c[03-04]", "r1c03")],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


# ---------------------------------------------------------------- settings
def test_settings_from_file_and_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.yaml", {"executor": "slurm", "slurm": {"nodes": 2, "tasks_per_node": 8}, "env": ["WANDB_API_KEY"]}
    )
    settings = load_settings(path, ["slurm.nodes=4", "retries=2", "slurm.extra={constraint: h100}"])
    assert settings.num_ranks == 32 and settings.retries == 2 and settings.env == ("WANDB_API_KEY",)
    assert settings.slurm.extra == {"constraint": "h100"} and settings.program.endswith(".venv/bin/python")
    for words in ([], ["executor=slurm"], ["slurm.nodes=4"]):
        assert load_settings(None, words).num_ranks is None, "one process: the configuration says nproc"
    assert load_settings(None, ["container.image=a/b:1"]).program == "python"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["executor=cloud"], ["executor='cloud'", "local, slurm, docker"]),
        (["slurm.nodez=2"], ["nodez"]),
        (["slurm.nodes=0"], ["slurm.nodes=0", "greater than 0"]),
        (["slurm.nodes=many"], ["many"]),
        (["slurm.dependency=afterwards"], ["slurm.dependency", "afterok"]),
        (["slurm.signal=KILL"], ["slurm.signal='KILL'", "USR1, TERM or INT", "without saving"]),
        (["slurm.signal=B:USR1@60"], ["slurm.signal='B:USR1@60'"]),
        (["slurm.time=forever"], ["slurm.time='forever'", "hours:minutes:seconds"]),
        (["python=-c"], ["python='-c'", "without arguments"]),
        (["retries=-1"], ["retries=-1"]),
        (["container.mounts=[data]"], ["container.mounts", "/outside:/inside"]),
        (["env=[wandb_api_key]"], ["wandb_api_key", "capitals"]),
        (["variables={HF_TOKEN: abc}"], ["HF_TOKEN", "secret", "Name it in env"]),
        (["executor=docker"], ["container.image"]),
        (["executor=docker", "container.image=a", "env=[A]"], ["env is not allowed with docker"]),
        (["nodes"], ["key=value"]),
        (["python=${oc.env:HOME}"], ["resolvers are not allowed", "config.yaml"]),
    ],
)
def test_wrong_settings_are_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_settings(None, overrides)
    for word in words:
        assert word in str(error.value)


def test_the_examples_load() -> None:
    settings = sorted((REPOSITORY / "examples" / "launch").glob("*settings*.yaml"))
    assert len(settings) == 3
    for path in settings:
        load_settings(path, [])
    experiment = read_experiment(REPOSITORY / "examples/launch/experiment.yaml", None, [], 2)
    assert [task.name for task in experiment.tasks] == ["cold-start", "convert", "grpo", "evaluate"]


# ---------------------------------------------------------------- experiments
TASK = {"name": "a", "command": "grpo", "config": QUICKSTART}


def test_an_experiment_of_every_kind(tmp_path: Path) -> None:
    sweep = write(
        tmp_path / "s.yaml", {"config": QUICKSTART, "run_dir": "runs/s", "presets": ["gdpo"], "seeds": [1, 2]}
    )
    tasks = [
        {"name": "cold", "command": "sft", "config": QUICKSTART, "overrides": ["train.steps=3"]},
        {"name": "convert", "command": "convert", "arguments": ["verify", "a", "b"], "after": ["cold"]},
        {"name": "both", "sweep": str(sweep), "after": ["cold", "convert"]},
        {"name": "judge", "command": "evaluate", "config": "runs/s/not-yet", "after": ["both"]},
    ]
    experiment = read_experiment(write(tmp_path / "e.yaml", {"name": "e", "tasks": tasks}), None, [], 4)
    cold, convert, both, judge = experiment.tasks
    assert cold.steps[0].words == (QUICKSTART, "train.steps=3", "nproc=4") and cold.on_ranks
    assert convert.steps[0].words == ("verify", "a", "b") and not convert.on_ranks
    assert [step.name for step in both.steps] == ["gdpo-seed1", "gdpo-seed2"] and both.after == ("cold", "convert")
    assert "objective.preset=gdpo" in both.steps[1].words and "seed=2" in both.steps[1].words
    assert judge.steps[0].words == ("runs/s/not-yet", "nproc=4")


def test_one_configuration_is_an_experiment_of_one_task() -> None:
    experiment = read_experiment(Path(QUICKSTART), "grpo", ["train.steps=3"], None)
    (task,) = experiment.tasks
    assert task.steps == (Step("grpo", "grpo", (QUICKSTART, "train.steps=3")),)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"name": "e", "tasks": []}, ["tasks must be a list"]),
        ({"name": "E 1", "tasks": [TASK]}, ["name='E 1'"]),
        ({"name": "e", "jobs": 1, "tasks": [TASK]}, ["jobs is not allowed"]),
        ({"name": "e", "tasks": [TASK, TASK]}, ["two tasks are named a"]),
        ({"name": "e", "tasks": [{**TASK, "after": ["b"]}]}, ["task a", "after=b"]),
        ({"name": "e", "tasks": [{**TASK, "command": "train"}]}, ["command='train'", "sft, grpo"]),
        ({"name": "e", "tasks": [{**TASK, "config": ""}]}, ["take a config"]),
        ({"name": "e", "tasks": [{**TASK, "overrides": "train.steps=3"}]}, ["overrides=", "a list of texts"]),
        (
            {"name": "e", "tasks": [{**TASK, "overrides": ["train.steps=0"]}]},
            ["task a", "train.steps", "at least 1"],
        ),
        ({"name": "e", "tasks": [{**TASK, "gpus": 8}]}, ["gpus is not allowed"]),
        ({"name": "e", "tasks": [{**TASK, "sweep": "s.yaml"}]}, ["a sweep says itself"]),
        ({"name": "e", "tasks": [{"name": "c", "command": "convert", "config": QUICKSTART}]}, ["only arguments"]),
    ],
)
def test_a_wrong_experiment_is_named(tree: Any, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "e.yaml", tree)
    with pytest.raises(ConfigError) as error:
        read_experiment(path, None, [], None)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_command_and_file_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--command sft\|grpo"):
        read_experiment(Path(QUICKSTART), None, [], None)
    with pytest.raises(ConfigError, match="leave --command and key=value out"):
        read_experiment(write(tmp_path / "e.yaml", {"name": "e", "tasks": [TASK]}), None, ["seed=2"], None)
    with pytest.raises(ConfigError, match="nproc"):
        read_experiment(Path(QUICKSTART), "grpo", ["layout.tensor=4"], 6)
    with pytest.raises(ConfigError, match="is not a file"):
        read_experiment(tmp_path / "none.yaml", None, [], None)


# ---------------------------------------------------------------- scripts
@pytest.mark.parametrize(
    ("statuses", "attempts", "status"),
    [([0], 1, 0), ([1, 0], 2, 0), ([1, 1, 1, 0], 3, 1), ([STOPPED_STATUS, 0], 1, STOPPED_STATUS)],
)
def test_a_step_is_tried_again_but_not_when_it_was_asked_to_stop(
    statuses: list[int], attempts: int, status: int, tmp_path: Path
) -> None:
    program = tmp_path / "program with space"
    program.write_text(
        f"#!/bin/bash\necho x >> {tmp_path}/log\nset -- {' '.join(map(str, statuses))}\n"
        f"shift $(( $(wc -l < {tmp_path}/log) - 1 ))\nexit $1\n"
    )
    program.chmod(0o755)
    settings = LaunchSettings(workdir=str(tmp_path), python=str(program), retries=2)
    marks = tmp_path / "marks"
    script = tmp_path / "script.sh"
    script.write_text(local_script("b", Step("b", "grpo", ("c.yaml",)), settings, marks, ["a"]))
    refused = subprocess.run(["bash", script], capture_output=True, text=True)
    assert refused.returncode == 1 and "b is not started: a did not succeed" in refused.stdout
    assert not (tmp_path / "log").exists()

    (marks / "a").touch()
    assert subprocess.run(["bash", script], capture_output=True).returncode == status
    assert (tmp_path / "log").read_text().count("x") == attempts
    assert (marks / "b").exists() == (status == 0)


def launch(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {
        **plain,
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "200",
        "A_SECRET": "not to be written",
        **variables,
    }
    command = [str(word) for word in (LAUNCH, "launch", *words)]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=600)


@needs_nemo_run
def test_dry_run_on_slurm_prints_what_sbatch_would_get(tmp_path: Path) -> None:
    settings = write(
        tmp_path / "settings.yaml",
        {
            "executor": "slurm",
            "env": ["A_SECRET"],
            "variables": {"NCCL_DEBUG": "WARN OFF"},
            "retries": 3,
            "container": {"image": "images/sr1.sqsh", "mounts": ["/data:/data:ro"]},
            "slurm": {
                **{"account": "lab", "partition": "gpu", "time": "1-00:00:00", "nodes": 2, "tasks_per_node": 8},
                **{"gpus_per_node": 8, "extra": {"constraint": "h100"}, "setup": ["module load x"], "parallel": 2},
            },
        },
    )
    sweep = write(tmp_path / "s.yaml", {"config": QUICKSTART, "run_dir": "r", "presets": ["gdpo"], "seeds": [1, 2, 3]})
    tasks = [TASK, {"name": "b", "sweep": str(sweep), "after": ["a"]}]
    done = launch(
        write(tmp_path / "e.yaml", {"name": "e", "tasks": tasks}), "--settings", settings, "--dry-run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.split("# ---- b: b_sbatch.sh")
    for line in ("account=lab", "partition=gpu", "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "constraint=h100"):
        assert f"#SBATCH --{line}\n" in first and f"#SBATCH --{line}\n" in second
    for line in ("#SBATCH --time=1-00:00:00", "#SBATCH --signal=USR1@300", "TORCHX_MAX_RETRIES=3", "module load x"):
        assert line in first
    assert "export NCCL_DEBUG='WARN OFF'" in first and "-eq 75" in first and "scontrol requeue" in first
    for text in (first, second):
        assert not subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr
    (srun,) = [line for line in first.splitlines() if line.startswith("srun --output")]
    assert "--container-image images/sr1.sqsh" in srun and f"{tmp_path}:{tmp_path},/data:/data:ro" in srun
    assert "--container-env A_SECRET" in srun and srun.rindex("--kill-on-bad-exit=0") > srun.rindex("on-bad-exit=1")
    assert f"exec python -m megatron_sr1.cli grpo {QUICKSTART} nproc=16" in first
    assert "#SBATCH --array=0-2%2" in second and "# b comes after a" in second
    for number in range(3):
        assert f"  {number}) exec python -m megatron_sr1.cli grpo {QUICKSTART}" in second
    assert "not to be written" not in done.stdout + done.stderr
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()], "nothing may be left"


@needs_nemo_run
def test_mistakes_end_with_one_line(tmp_path: Path) -> None:
    experiment = write(tmp_path / "e.yaml", {"name": "e", "tasks": [TASK]})
    for words, expected in (
        ((experiment, "--set", "env=[NOT_SET_ANYWHERE]"), "NOT_SET_ANYWHERE is not set in this shell"),
        ((experiment, "--set", "logs=/tmp/nemo_run/logs"), "logs='/tmp/nemo_run/logs' is not allowed"),
        ((experiment, "--settings", "none.yaml"), "none.yaml is not a file"),
    ):
        done = launch(*words, cwd=tmp_path)
        assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


@needs_nemo_run
def test_a_machine_that_cannot_take_it_is_told(tmp_path: Path) -> None:
    """No Slurm; one that refuses the job; one without accounting; no Docker."""
    experiment = write(tmp_path / "e.yaml", {"name": "e", "tasks": [TASK]})
    tools = {}
    for name, sbatch in (("none", None), ("refusing", "echo invalid partition specified: gpu >&2; exit 1")):
        tools[name] = tmp_path / name
        tools[name].mkdir()
        for program in ("bash", "sh", "env", "mkdir"):
            (tools[name] / program).symlink_to(f"/bin/{program}" if program != "env" else "/usr/bin/env")
        for program, body in (("sbatch", sbatch), ("sacct", sbatch)):
            if body is not None:
                (tools[name] / program).write_text(f"#!/bin/bash\n{body}\n")
                (tools[name] / program).chmod(0o755)
    slurm = (experiment, "--executor", "slurm")
    docker = (experiment, "--executor", "docker", "--set", "container.image=a")
    for words, variables, expected in (
        (slurm, {"PATH": str(tools["none"])}, "there is no sbatch here"),
        (slurm, {"PATH": str(tools["refusing"])}, "invalid partition specified: gpu"),
        ((*slurm, "--follow"), {"PATH": str(tools["refusing"])}, "accounting (sacct)"),
        (docker, {"DOCKER_HOST": "tcp://127.0.0.1:1"}, "docker: "),
    ):
        done = launch(*words, cwd=tmp_path, **variables)
        assert done.returncode == 2 and expected in done.stderr, done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_without_nemo_run_it_says_where_it_is(tmp_path: Path) -> None:
    experiment = write(tmp_path / "e.yaml", {"name": "e", "tasks": [TASK]})
    command = [sys.executable, "-m", "megatron_sr1.cli", "launch", str(experiment)]
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 2 and "make launch-env" in done.stderr


@needs_nemo_run
def test_a_failed_task_stops_what_comes_after_it(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\necho "$3" >> {tmp_path}/seen\n[ "$3" != sft ]\n')
    program.chmod(0o755)
    tasks = [{**TASK, "command": "sft"}, {**TASK, "name": "b", "after": ["a"]}, {**TASK, "name": "c"}]
    experiment = write(tmp_path / "e.yaml", {"name": "e", "tasks": tasks})
    done = launch(experiment, "--set", f"python={program}", "--set", "retries=1", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    for line in ("a: failed", "b: failed", "c: succeeded"):
        assert line in done.stdout
    assert sorted((tmp_path / "seen").read_text().split()) == ["grpo", "sft", "sft"], "a twice, b never, c"


@needs_nemo_run
def test_a_launch_that_is_ended_asks_its_runs_to_stop(tmp_path: Path) -> None:
    """SIGTERM to the command: the run gets SIGUSR1 and saves, is not tried again, and the next task does not start."""
    program, seen = tmp_path / "python", tmp_path / "seen"
    program.write_text(
        f"#!/bin/bash\ntrap 'sleep 1; echo $3 saved >> {seen}; exit {STOPPED_STATUS}' USR1\n"
        f"echo $3 started >> {seen}\nfor i in $(seq 600); do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    experiment = write(tmp_path / "e.yaml", {"name": "e", "tasks": [{**TASK, "command": "sft"}, {**TASK, "name": "c"}]})
    command = [str(LAUNCH), "launch", str(experiment), "--set", f"python={program}", "--set", "retries=1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "a: failed" in printed and "c: failed" in printed
    assert seen.read_text().splitlines() == ["sft started", "sft saved"]
    assert not list((tmp_path / "runs").rglob("*.pid"))


# ---------------------------------------------------------------- for real
@needs_nemo_run
def test_a_sweep_of_two_presets_for_real(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through NeMo-Run's local executor: two runs of the digits task, each with its own preset and folder, and their
    report. `tests/test_sweep.py` stops and continues a sweep."""
    words = workspace.command("grpo", "unused")[4:]
    overrides = [word for word in words[1:] if not word.startswith("run_dir=")]
    shrunk = ["nproc=1", "layout.tensor=1", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2"]
    shrunk += ["train.batch_size=2", "train.steps=2", "evaluate.max_prompts=4", "rollout.max_response_tokens=32"]
    sweep = {
        **{"config": words[0], "run_dir": str(workspace.folder / "sweep"), "presets": ["see_think", "vision_sr1"]},
        **{"seeds": [2], "overrides": [*overrides, *shrunk]},
    }
    python = REPOSITORY / ".venv/bin/python"
    settings = ["--set", f"python={python}", "--set", "parallel=2"]
    done = launch(write(workspace.folder / "presets.yaml", sweep), "--follow", *settings, cwd=workspace.folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    names = ["see_think-seed2", "vision_sr1-seed2"]
    for name in names:
        assert f"presets-{name}: succeeded" in done.stdout
        folder = workspace.folder / "sweep" / name
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert f"{config['objective']['preset']}-seed{config['seed']}" == name
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
        assert (folder / "hf" / "model.safetensors").exists() and (folder / "eval" / "after.json").exists()
    assert "step 2/2" in done.stderr + done.stdout, "--follow prints the runs' logs"
    first = [
        json.loads((workspace.folder / "sweep" / name / "metrics.jsonl").read_text().splitlines()[0]) for name in names
    ]
    assert first[0]["reward/total"] != first[1]["reward/total"] or first[0]["grad_norm"] != first[1]["grad_norm"]

    monkeypatch.chdir(REPOSITORY)
    main(["report", str(workspace.folder / "presets.yaml")])
    assert "Paired differences to see_think" in capsys.readouterr().out
    _, group = json.loads((workspace.folder / "sweep" / "sweep.json").read_text())
    assert "reward/acc_vis" in group["after"]
    assert group["paired_differences_to_the_first"]["accuracy"]["num"] == 1
    assert "sweep-paired" in (workspace.folder / "sweep" / "report.html").read_text()
