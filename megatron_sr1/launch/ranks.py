"""Ranks that srun has started, in the words of torchrun."""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 20000, 20000  # below the ports that Linux gives out by itself


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task of an srun step; {} anywhere else.

    Anywhere else is also a batch script itself, a step of one task (which starts its ranks by `nproc`), and where
    torchrun has named the ranks already. The main rank's machine is the first of the step; all ranks compute the same
    port from the job and the step.

    Args:
        environment: with the variables that srun sets (srun(1), OUTPUT ENVIRONMENT VARIABLES).
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_FIRST_PORT + number % _NUM_PORTS),
    }


def first_node(nodes: str) -> str:
    """The first name of a Slurm list of nodes: node07 of "node[07-09,12],login1"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)
