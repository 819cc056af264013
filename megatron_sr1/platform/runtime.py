"""What machine this is: device, collective backend, and the process group of a run."""

from __future__ import annotations

import datetime
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed

from megatron_sr1.platform.cpu_shim import install_cpu_shim, patch_megatron_rng
from megatron_sr1.platform.torchvision_ops import define_missing_torchvision_ops

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # a rank that waits longer than this for a dead peer fails


@dataclass(frozen=True)
class Platform:
    """Device and backend of this process, and its place among the ranks."""

    device: torch.device
    backend: str
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


def start_platform() -> Platform:
    """Prepares this process: patches Megatron-Core where there is no accelerator, joins the process group.

    Under torchrun the environment names the ranks; without it the process is a group of one. Call it before anything
    imports Megatron-Core.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        install_cpu_shim()
        # Megatron-Core says on every import that apex and Transformer Engine are absent: here that is as it should be
        warnings.filterwarnings("ignore", module="megatron.*")
    define_missing_torchvision_ops()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not on_cpu:
        torch.cuda.set_device(device)
    backend = "gloo" if on_cpu else "nccl"
    if not torch.distributed.is_initialized():
        alone = "RANK" not in os.environ
        torch.distributed.init_process_group(
            backend,
            timeout=COLLECTIVE_TIMEOUT,
            **({"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if alone else {}),
        )
    if on_cpu:
        patch_megatron_rng()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // torch.distributed.get_world_size()))
    return Platform(device, backend, torch.distributed.get_rank(), torch.distributed.get_world_size())
