"""Where and how an experiment runs: a YAML file of settings, then key=value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_sr1.config import ConfigError, home_path, read_mapping, read_overrides
from megatron_sr1.config.declared import as_declared
from megatron_sr1.config.files import refuse_resolvers
from megatron_sr1.launch.unquoted import sbatch_problems, unquoted_problems

EXECUTORS = ("local", "slurm", "docker")
DEPENDENCIES = ("afterok", "afterany", "aftercorr")  # aftercorr: element by element of two arrays
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SIGNAL = re.compile(r"(R:)?(SIG)?(USR1|TERM|INT)(@[0-9]{1,5})?")  # those that a run saves on
_SIGNAL_WORDS = "USR1, TERM or INT, with @ and seconds, such as USR1@300: at another one a run ends without saving"
_TIME = re.compile(r"[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
_MOUNT = re.compile(r"/[^:]*:/[^:]*(:r[ow])?")
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS(?!_?THROUGH)|PWD|PSWD|AUTH(?!ORS?(_|$))|CREDENTIAL|CREDS?(_|$)|COOKIE|BEARER|WEBHOOK|DSN"
    r"|SIGNATURE|(^|_)(PAT|PW|SIG|SAS)$"
)
_SECRET_VALUE = re.compile(r"://[^/@\s]+@")  # of a URL: a user, and mostly a password


@dataclass(frozen=True)
class SlurmSettings:
    """What sbatch is asked for. `nodes * tasks_per_node` tasks of srun are the ranks; one alone starts `nproc`."""

    account: str = ""
    partition: str | None = None
    qos: str | None = None
    time: str = "04:00:00"  # limit of one job, [days-]hours:minutes:seconds
    nodes: int = 1
    tasks_per_node: int = 1  # ranks; one per GPU
    gpus_per_node: int | None = None  # null: the cluster has none, or gives them with the node
    cpus_per_task: int | None = None
    mem: str | None = None  # per node, such as 0 (all) or 64G
    signal: str | None = "USR1@300"  # SIGUSR1 to the ranks, these seconds before the limit: save and requeue
    dependency: str = "afterok"
    parallel: int = 0  # of a sweep's array, how many at a time; 0: no limit
    extra: dict[str, str] = field(default_factory=dict)  # further sbatch parameters, such as {constraint: h100}
    setup: tuple[str, ...] = ()  # lines of the batch script before srun, such as "module load ..."


@dataclass(frozen=True)
class ContainerSettings:
    """The image that tasks run in; Slurm starts it with Pyxis."""

    image: str | None = None
    mounts: tuple[str, ...] = ()  # /outside:/inside[:ro]; the working directory is mounted in any case
    gpus: int = -1  # docker: how many; -1: all, 0: none
    shm_size: str = "16g"  # docker


@dataclass(frozen=True)
class LaunchSettings:
    """Where and how the tasks of an experiment run."""

    executor: str = "local"
    workdir: str = "."  # every path of an experiment is taken from here
    python: str = ""  # that has megatron_sr1; "": .venv/bin/python of workdir, or the container's own
    logs: str = "runs/launch"  # what NeMo-Run keeps: scripts, logs, state
    retries: int = 0  # of a task that fails; one that was asked to stop is not a failure
    parallel: int = 1  # local and docker: tasks at a time
    env: tuple[str, ...] = ()  # names of variables of this shell that tasks get; their values go into no file
    variables: dict[str, str] = field(default_factory=dict)  # and variables with values, which must not be secrets
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    container: ContainerSettings = field(default_factory=ContainerSettings)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ConfigError(problem)

    @property
    def folder(self) -> Path:
        """The working directory, absolute."""
        return Path(home_path("workdir", self.workdir)).resolve()

    @property
    def log_folder(self) -> Path:
        return (self.folder / home_path("logs", self.logs)).resolve()

    @property
    def program(self) -> str:
        """The Python that runs a task."""
        if self.python:
            return self.python if self.container.image else home_path("python", self.python)
        return "python" if self.container.image else str(self.folder / ".venv/bin/python")

    @property
    def num_ranks(self) -> int | None:
        """Ranks of a task; None where one process starts as many as its configuration says by `nproc`."""
        ranks = self.slurm.nodes * self.slurm.tasks_per_node
        return ranks if self.executor == "slurm" and ranks > 1 else None


def load_settings(path: Path | None, overrides: Sequence[str]) -> LaunchSettings:
    """Reads a settings file, applies `key=value`, validates.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type or a value that is not allowed.
    """
    if path is not None and not path.is_file():
        raise ConfigError(f"--settings {path} is not a file. Give a YAML file, such as one of examples/launch.")
    parts = {} if path is None else {f"{path}: ": read_mapping(path)}
    parts["--set "] = read_overrides(overrides, "--set")
    tree = OmegaConf.structured(LaunchSettings)
    for where, part in parts.items():
        refuse_resolvers(part, where.strip(": "))
        try:
            tree = OmegaConf.merge(tree, as_declared(LaunchSettings, OmegaConf.to_container(part), ""))
        except (ConfigError, OmegaConfBaseException) as error:
            raise ConfigError(f"{where}{' '.join(str(error).split())}") from error
    settings = OmegaConf.to_object(tree)
    assert isinstance(settings, LaunchSettings), type(settings)
    return settings


def _problems(settings: LaunchSettings) -> list[str]:
    slurm, container = settings.slurm, settings.container
    found = []

    def need(condition: bool, key: str, got: Any, allowed: str) -> None:
        if not condition:
            found.append(f"{key}={got!r} is not allowed: it must be {allowed}.")

    need(settings.executor in EXECUTORS, "executor", settings.executor, "one of " + ", ".join(EXECUTORS))
    need(settings.retries >= 0, "retries", settings.retries, "0 or more")
    need(settings.parallel > 0, "parallel", settings.parallel, "greater than 0")
    need(slurm.nodes > 0, "slurm.nodes", slurm.nodes, "greater than 0")
    need(slurm.tasks_per_node > 0, "slurm.tasks_per_node", slurm.tasks_per_node, "greater than 0")
    python = settings.python or ""
    need(not python.startswith("-"), "python", python, "a command, without arguments")
    need(slurm.dependency in DEPENDENCIES, "slurm.dependency", slurm.dependency, "one of " + ", ".join(DEPENDENCIES))
    need(slurm.parallel >= 0, "slurm.parallel", slurm.parallel, "0 or more")
    lines = {f"slurm.{name}": getattr(slurm, name) for name in ("partition", "qos", "time", "mem", "signal")}
    found += sbatch_problems(lines, slurm.extra)
    need(slurm.signal is None or bool(_SIGNAL.fullmatch(slurm.signal)), "slurm.signal", slurm.signal, _SIGNAL_WORDS)
    need(bool(_TIME.fullmatch(slurm.time)), "slurm.time", slurm.time, "[days-]hours:minutes:seconds")
    paths = {"workdir": str(settings.folder), "logs": str(settings.log_folder)}
    found += unquoted_problems(settings.executor, paths, slurm.account, container.image, container.mounts)
    for mount in container.mounts:
        need(bool(_MOUNT.fullmatch(mount)), "container.mounts", mount, "/outside:/inside, with :ro or :rw if wanted")
    for name in (*settings.env, *settings.variables):
        need(bool(_VARIABLE.fullmatch(name)), "env", name, "a variable's name in capitals")  # NeMo-Run makes it so
    for name, value in settings.variables.items():
        if _SECRET.search(name) or _SECRET_VALUE.search(value):
            found.append(f"variables.{name} looks like a secret, and would be written to files. Name it in env.")
    if settings.executor == "docker":
        need(container.image is not None, "container.image", None, "an image for --executor docker")
        if settings.env:
            found.append(
                "env is not allowed with docker: NeMo-Run writes a container's variables to files. Mount a file that "
                "holds the secret, or put what is none under variables."
            )
    return found
