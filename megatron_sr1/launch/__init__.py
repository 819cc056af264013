"""Experiments on this machine, in containers or on a Slurm cluster, through NeMo-Run.

Nothing heavy is imported here, not even by the command: it works where only NeMo-Run and the configuration are.
"""

from megatron_sr1.launch.command import add_launch_options, run_launch
from megatron_sr1.launch.ranks import started_rank

__all__ = ["add_launch_options", "run_launch", "started_rank"]
