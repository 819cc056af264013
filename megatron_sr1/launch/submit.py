"""Experiments through NeMo-Run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_sr1.config import ConfigError
from megatron_sr1.launch.executors import docker_executor, local_executor, slurm_executor
from megatron_sr1.launch.experiment import Experiment
from megatron_sr1.launch.script import STOPPED_MARK, local_script, slurm_script
from megatron_sr1.launch.settings import LaunchSettings
from megatron_sr1.signals import handled

if TYPE_CHECKING:
    import nemo_run  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Job:
    """One thing that NeMo-Run starts."""

    name: str
    script: str
    executor: nemo_run.Executor
    after: tuple[str, ...]  # names of jobs that come before


def check_machine(settings: LaunchSettings, environment: Mapping[str, str]) -> None:
    """What must be there to write the scripts.

    Raises:
        ConfigError: NeMo-Run or a variable that tasks want is missing, or a folder has a name it changes.
    """
    if importlib.util.find_spec("nemo_run") is None:
        raise ConfigError(
            "NeMo-Run is not installed here; it lives in an environment of its own. "
            "Run `make launch-env`, then .venv-launch/bin/megatron-sr1 launch ..."
        )
    missing = [name for name in settings.env if name not in environment]
    if missing:
        raise ConfigError(f"env: {missing[0]} is not set in this shell. Export it, or take it out of the settings.")
    for key, folder in (("logs", settings.log_folder), ("workdir", settings.folder)):
        if "/nemo_run" in str(folder):
            raise ConfigError(f"{key}={str(folder)!r} is not allowed: NeMo-Run rewrites paths with /nemo_run.")


def doubts(experiment: Experiment, settings: LaunchSettings) -> list[str]:
    """What would only show when a task starts, or not at all: for --dry-run, which cannot know another machine."""
    found = []
    program = settings.folder / settings.program  # an absolute one stays as it is
    if settings.container.image is None and not (shutil.which(settings.program) or os.access(program, os.X_OK)):
        found.append(f"python={settings.program!r} is no program on this machine: tasks need one that has megatron_sr1")
    on_ranks = any(task.on_ranks for task in experiment.tasks)
    asks = bool(settings.slurm.gpus_per_node) or any(key.startswith(("gres", "gpus")) for key in settings.slurm.extra)
    if settings.executor == "slurm" and on_ranks and not asks:
        found.append("slurm.gpus_per_node is not set: unless the cluster gives GPUs with the node, tasks run on CPUs")
    if settings.executor == "docker" and on_ranks and not settings.container.gpus:
        found.append("container.gpus=0: tasks run on CPUs")
    return found


def submit(experiment: Experiment, settings: LaunchSettings, *, follow: bool) -> bool:
    """Starts the experiment and returns whether all went well; on Slurm, unless it follows, whether it is queued.

    Args:
        follow: print the tasks' logs as they grow, until all have ended. On Slurm that needs its accounting (sacct).

    Raises:
        ConfigError: Slurm is not here, refuses a job or has no accounting to follow by; Docker does not answer.
    """
    if settings.executor == "slurm":
        _check_slurm(follow)
    identity = _identity(experiment)
    detach = settings.executor == "slurm" and not follow
    with ExitStack() as stack:
        if settings.executor == "local":
            stack.enter_context(_passing_on_signals(_marks(settings, identity)))
        nemo = stack.enter_context(_nemo_experiment(experiment, settings, identity, detach))
        from docker.errors import DockerException  # pyright: ignore[reportMissingModuleSource]
        from invoke.exceptions import UnexpectedExit  # pyright: ignore[reportMissingImports]

        for job in _jobs(experiment, settings, identity):
            _add(nemo, job)
        try:
            nemo.run(detach=detach, tail_logs=follow)
        except UnexpectedExit as error:
            words = " ".join(error.result.stderr.split())
            raise ConfigError(f"{error.result.command}: {words}. What was queued before it is in squeue.") from error
        except DockerException as error:
            raise ConfigError(f"docker: {error}. Is its service running, and may this user talk to it?") from error
    folder = _folder(experiment, settings, identity)
    for job in nemo.jobs:
        state = f"queued as {_job_number(job.handle)}" if detach else job.state.name.lower()
        print(f"{job.id}: {state}; {folder / job.id}")
    return detach or all(job.state.name == "SUCCEEDED" for job in nemo.jobs)


@contextmanager
def _passing_on_signals(marks: Path) -> Iterator[None]:
    """While it lasts, SIGTERM or Ctrl-C asks the running steps to stop, as a cluster would, and starts no other.

    A second one kills them. NeMo-Run alone would end and leave them running.
    """
    asked = False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        passed_on, asked = signal.SIGKILL if asked else signal.SIGUSR1, True
        marks.mkdir(parents=True, exist_ok=True)
        (marks / STOPPED_MARK).touch()
        for file in marks.glob("*.pid"):
            with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                os.killpg(int(file.read_text()), passed_on)

    with handled((signal.SIGTERM, signal.SIGINT), receive):
        yield


def _check_slurm(follow: bool) -> None:
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here: launch on a login node of the cluster, or look with --dry-run.")
    if follow and subprocess.run(["sacct", "--noheader"], capture_output=True).returncode:
        raise ConfigError(
            "--follow asks Slurm's accounting (sacct), which does not answer. Leave it out; then tail -F."
        )


def print_scripts(experiment: Experiment, settings: LaunchSettings) -> None:
    """Prints what `submit` would hand over, and starts nothing."""
    identity = _identity(experiment)
    with _nemo_experiment(experiment, settings, identity, True) as nemo:
        for job in _jobs(experiment, settings, identity):
            _add(nemo, job)
        nemo.dryrun(log=False, delete_exp_dir=False)
    folder = _folder(experiment, settings, identity)
    for job in nemo.jobs:
        batch = folder / f"{job.id}_sbatch.sh"
        for path in [*([batch] if batch.exists() else []), *sorted((folder / job.id / "scripts").glob("*.sh"))]:
            print(f"# ---- {job.id}: {path.name}\n{path.read_text().strip()}\n")
        if job.dependencies:
            print(f"# {job.id} comes after {', '.join(job.dependencies)}\n")
    shutil.rmtree(folder)


def _identity(experiment: Experiment) -> str:
    return f"{experiment.name}_{time.time_ns()}"  # as NeMo-Run names experiments, so that its own commands find them


def _folder(experiment: Experiment, settings: LaunchSettings, identity: str) -> Path:
    return settings.log_folder / "experiments" / experiment.name / identity


def _marks(settings: LaunchSettings, identity: str) -> Path:
    """Where the steps on this machine leave what they have come to."""
    return settings.log_folder / "succeeded" / identity


def _job_number(handle: str) -> str:
    """Slurm's, from slurm_tunnel://nemo_run/<number>."""
    return handle.rpartition("/")[2]


def _nemo_experiment(
    experiment: Experiment, settings: LaunchSettings, identity: str, quiet: bool
) -> nemo_run.Experiment:
    os.environ["NEMORUN_HOME"] = str(settings.log_folder)  # read when it is imported
    import nemo_run  # pyright: ignore[reportMissingImports]

    return nemo_run.Experiment(
        experiment.name,
        id=identity,
        base_dir=str(settings.log_folder),
        clean_mode=quiet,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        log_level="WARNING",
    )


def _add(nemo: nemo_run.Experiment, job: Job) -> None:
    from nemo_run import Script  # pyright: ignore[reportMissingImports]

    nemo.add(Script(inline=job.script), executor=job.executor, name=job.name, dependencies=list(job.after))


def _jobs(experiment: Experiment, settings: LaunchSettings, identity: str) -> Iterator[Job]:
    if settings.executor == "slurm":
        for task in experiment.tasks:
            yield Job(task.name, slurm_script(task, settings), slurm_executor(settings, task), task.after)
        return
    build = docker_executor if settings.executor == "docker" else local_executor
    marks = _marks(settings, identity)
    names = {
        task.name: [task.name if len(task.steps) == 1 else f"{task.name}-{step.name}" for step in task.steps]
        for task in experiment.tasks
    }
    done: list[str] = []
    for task in experiment.tasks:
        before = [name for other in task.after for name in names[other]]
        for name, step in zip(names[task.name], task.steps, strict=True):
            # `parallel` at a time: each also waits for the one that many places before it
            place = done[-settings.parallel :][:1] if len(done) >= settings.parallel else []
            script = local_script(name, step, settings, marks, before)
            yield Job(name, script, build(settings), tuple(dict.fromkeys([*before, *place])))
            done.append(name)
