"""Which rank this process is, where torchrun, srun or a cluster's operator has started it as one of several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sr1.config import Config, ConfigError

_FIRST_PORT, _NUM_PORTS = 20000, 20000  # below the ports that Linux gives out by itself
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM_NEEDED = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE")
_ALONE = "To start the ranks by nproc instead, unset them: env -u RANK -u WORLD_SIZE -u SLURM_STEP_NUM_TASKS"


@dataclass(frozen=True)
class StartedRank:
    """One of `num_ranks` processes that somebody else has started."""

    variables: Mapping[str, str]  # torchrun's, of this rank
    num_ranks: int
    counted_by: str  # the variable that says how many there are

    def check(self, config: Config) -> None:
        """
        Raises:
            ConfigError: the configuration says another number of ranks.
        """
        if config.nproc != self.num_ranks:
            raise ConfigError(
                f"{self.counted_by}={self.num_ranks} in the environment contradicts nproc={config.nproc}: this is rank "
                f"{self.variables['RANK']} of ranks that are started already. Start {config.nproc}, or set "
                f"nproc={self.num_ranks}. {_ALONE} ..."
            )


def started_rank(environment: Mapping[str, str]) -> StartedRank | None:
    """The rank that this process is by its environment; None where it starts its ranks itself.

    Raises:
        ConfigError: a variable is missing, no number, or contradicts another; the message names it.
    """
    variables = {name: environment[name] for name in _NEEDED if environment.get(name)} | slurm_ranks(environment)
    counted_by = "WORLD_SIZE" if environment.get("RANK") else "SLURM_STEP_NUM_TASKS"
    if not {"RANK", "WORLD_SIZE"} & set(variables):
        _refuse_mpi(environment)
        return None
    for name in _NEEDED:
        if name not in variables:
            present = ", ".join(f"{other}={value}" for other, value in variables.items())
            raise ConfigError(f"{name} is not set, but {present} is: a rank needs {', '.join(_NEEDED)}. {_ALONE} ...")
    num_ranks = _number("WORLD_SIZE", variables["WORLD_SIZE"], 1, 10**6)
    _number("RANK", variables["RANK"], 0, num_ranks - 1)
    _number("LOCAL_RANK", variables["LOCAL_RANK"], 0, num_ranks - 1)
    _number("MASTER_PORT", variables["MASTER_PORT"], 1, 65535)
    return StartedRank(variables, num_ranks, counted_by)


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task of an srun step; {} anywhere else.

    Anywhere else is also a batch script itself, a step of one task (which starts its ranks by `nproc`), and where
    torchrun has named the ranks already. The main rank's machine is the first of the step; all ranks compute the same
    port from the job and the step.

    Args:
        environment: with the variables that srun sets (srun(1), OUTPUT ENVIRONMENT VARIABLES).

    Raises:
        ConfigError: one of them is missing, or no number.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if environment.get("RANK") or _number("SLURM_STEP_NUM_TASKS", tasks, 1, 10**6) == 1:
        return {}
    for name in _SLURM_NEEDED:
        if not environment.get(name):
            raise ConfigError(f"{name} is not set, but SLURM_STEP_NUM_TASKS={tasks} is: srun sets both. {_ALONE} ...")
    job, step = (_number(name, environment[name], 0, 2**32) for name in _SLURM_NEEDED[:2])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_FIRST_PORT + (job + step) % _NUM_PORTS),
    }


def _refuse_mpi(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for one of several processes of mpirun: each would take itself for the whole run."""
    for name in _MPI_SIZES:
        size = environment.get(name, "1")
        if size.isdecimal() and int(size) > 1:
            raise ConfigError(
                f"{name}={size} in the environment: mpirun has started this process as one of {size}, and names no "
                "rank as torchrun does. Start them by torchrun or srun, or start one command with nproc."
            )


def first_node(nodes: str) -> str:
    """The first name of a Slurm list of nodes: node07 of "node[07-09,12],login1"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _number(name: str, text: str, low: int, high: int) -> int:
    if not (text.isdecimal() and len(text) < 20 and low <= int(text) <= high):
        raise ConfigError(
            f"{name}={text!r} in the environment is not allowed: it must be a whole number from {low} to {high}. "
            f"{_ALONE} ..."
        )
    return int(text)
