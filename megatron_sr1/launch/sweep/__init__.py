"""Sweeps: the file that says which runs, and the runs on this machine, each a process of its own."""

from megatron_sr1.launch.sweep.file import Sweep, SweepRun, read_sweep
from megatron_sr1.launch.sweep.local import STOPPED_STATUS, Outcome, command_of, run_here
from megatron_sr1.launch.sweep.state import choose_runs, state_of

__all__ = [
    "STOPPED_STATUS",
    "Outcome",
    "Sweep",
    "SweepRun",
    "choose_runs",
    "command_of",
    "read_sweep",
    "run_here",
    "state_of",
]
