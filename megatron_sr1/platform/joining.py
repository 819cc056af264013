"""How the ranks of a run find each other. While they wait, somebody says for how many."""

from __future__ import annotations

import datetime
import sys
import time

import torch.distributed
from torch.distributed import (
    DistNetworkError,
    DistStoreError,
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

TIMEOUT = datetime.timedelta(minutes=10)  # a rank that waits longer than this for another fails
SAY_EVERY = 20.0  # seconds
_POLL_SECONDS = 0.2
_ARRIVED = "megatron_sr1/arrived"  # how many ranks have come
_JOINED = "megatron_sr1/joined"  # how many are in the group
_COMPLETE = "megatron_sr1/complete"  # set when all are


def open_store(address: str, port: int, rank: int, timeout: datetime.timedelta = TIMEOUT) -> Store:
    """The store of ranks on several machines: rank 0 keeps it, the others look for it until it is there.

    Raises:
        ValueError: rank 0 cannot keep it at this port, or does not come.
    """
    where = f"MASTER_ADDR={address}, MASTER_PORT={port}"
    if rank == 0:
        try:
            return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout)
        except DistNetworkError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"rank 0 cannot listen at {where}: {reason}. Set another MASTER_PORT.") from error
    start, patience = time.monotonic(), datetime.timedelta(seconds=SAY_EVERY)
    while (waited := time.monotonic() - start) < timeout.total_seconds():
        try:
            store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
            store.set_timeout(timeout)  # that was of a try
            return store
        except (DistNetworkError, DistStoreError):
            _say(rank == 1, f"rank {rank} has waited {waited + SAY_EVERY:.0f} s for rank 0 at {where}")
    raise ValueError(f"rank {rank} found no rank 0 at {where} within {timeout}. Is it started?")


def join(store: Store, rank: int, num_ranks: int, backend: str, timeout: datetime.timedelta = TIMEOUT) -> None:
    """Makes the process group. Collective: returns when every rank is in it.

    The group itself is ready on one rank before another has connected to it: a rank that ended right then, with nothing
    to say to the others, would be the lost peer of theirs.

    Raises:
        ValueError: on rank 0, where a rank does not come.
    """
    store.add(_ARRIVED, 1)
    if rank == 0:
        _wait_for_all(store, num_ranks, timeout)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    if store.add(_JOINED, 1) == num_ranks:
        store.set(_COMPLETE, "")
    store.wait([_COMPLETE], timeout)


def _wait_for_all(store: Store, num_ranks: int, timeout: datetime.timedelta) -> None:
    start = said = time.monotonic()
    while (missing := num_ranks - store.add(_ARRIVED, 0)) > 0:
        now = time.monotonic()
        if now - start > timeout.total_seconds():
            raise ValueError(
                f"{missing} of {num_ranks} ranks did not come within {timeout}. Start as many as WORLD_SIZE "
                "or srun's number of tasks says; in a shell inside srun, start the run by srun itself."
            )
        if now - said >= SAY_EVERY:
            _say(True, f"waiting for {missing} of {num_ranks} ranks, for {now - start:.0f} s")
            said = now
        time.sleep(_POLL_SECONDS)


def _say(speaks: bool, text: str) -> None:
    if speaks:
        print(text, file=sys.stderr, flush=True)
