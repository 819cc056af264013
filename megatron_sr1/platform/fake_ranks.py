"""One process that takes the place of a rank among many, for questions about a layout that need no other rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed

from megatron_sr1.platform.runtime import Platform, join_alone, start_platform
from megatron_sr1.platform.torch_private import fake_store


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[Platform]:
    """Within it this process is `rank` of `world_size`: groups can be built and asked for ranks and sizes, and every
    collective does nothing. After it the process is alone, as it was before.

    Args:
        rank: 0 to world_size - 1.
    """
    platform = start_platform()
    assert platform.world_size == 1, "this process is one of several ranks already"
    assert 0 <= rank < world_size, (rank, world_size)
    store = fake_store()
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    try:
        yield Platform(platform.device, rank, world_size, platform.accelerator)
    finally:
        torch.distributed.destroy_process_group()
        join_alone()
