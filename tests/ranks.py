"""Runs a function on several gloo ranks: one launch, many checks inside it."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

TIMEOUT_SECONDS = 300  # a collective whose peer died fails after this, instead of hanging the test


def run_ranks(num_ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function(rank, num_ranks, *arguments)` on `num_ranks` processes that form a gloo group.

    `function` must be importable (module level). A failure on any rank fails the caller with that rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(_run_rank, args=(num_ranks, store, function, arguments), nprocs=num_ranks)


def _run_rank(rank: int, num_ranks: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    define_missing_torchvision_ops()
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
