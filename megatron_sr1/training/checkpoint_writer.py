"""Writes this rank's share of a checkpoint while the rank goes on: a copy on the host, and a thread that writes it.

A thread of the rank, not a process: it ends with the rank, so nothing of a killed run writes into the folder of the
next; it needs no second copy; and whoever writes or waits for a disk holds no lock that the rank needs.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed import ProcessGroup

from megatron_sr1.platform.megatron_private import read_results_in_process
from megatron_sr1.training.checksums import Checksums, checksums_of

read_results_in_process()


# It says queues of processes, and takes any. Made for a process of its own it comes in a wrapper that switches off the
# collection of garbage, which here would be that of the rank.
_WRAPPED: Any = FileSystemWriterAsync.write_preloaded_data
_WRITE: Any = getattr(_WRAPPED, "__wrapped__", _WRAPPED)


class CheckpointPlan:
    """Who writes what. It is made with the first checkpoint and serves them all, as the state keeps its structure."""

    def __init__(self, replicas: ProcessGroup, *, on_cpu: bool) -> None:
        """
        Args:
            replicas: the ranks that hold the same weights, of which each writes a part.
            on_cpu: what is trained lies on the host; else what lies there has been brought there to be written.
        """
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
        self._strategy: Any = FullyParallelSaveStrategyWrapper(strategy, replicas, do_cache_distribution=True)
        self._is_checked = False
        self._on_cpu = on_cpu

    def begin(self, state: dict[str, Any], folder: Path, further: Callable[[], None] | None = None) -> BegunSave:
        """Copies what this rank writes, for `BegunSave.start`. Collective.

        Args:
            state: may change as soon as this returns.
            folder: is there, and empty.
            further: writes something else of this rank's, in the thread.
        """
        options: dict[str, Any] = {"async_sharded_save": True, "validate_access_integrity": not self._is_checked}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # from 0.19 on
            options["async_strategy"] = "mcore"
        request = dist_checkpointing.save(state, str(folder), sharded_strategy=self._strategy, **options)
        self._is_checked = True
        return BegunSave(request, further, copies=self._on_cpu)


class BegunSave:
    """A checkpoint that is being written, from `start` on."""

    def __init__(self, request: Any, further: Callable[[], None] | None, *, copies: bool) -> None:
        """
        Args:
            request: Megatron-Core's `AsyncRequest`.
            copies: of tensors on the host, too.
        """
        self._finishing = request.finalize_fns
        self._further = further
        self._failure: str | None = "its thread ended early"
        self.checksums: Checksums = {}  # of this rank's files, when they are written
        self._transforms, self._buckets, self._results = [], [], None
        if request.async_fn is not None:  # else this rank has nothing to write
            _, buckets, self._results = request.async_fn_args
            self._transforms = request.async_fn.args[0]
            self._buckets = [
                (path, key, (objects, [(item, tensor.to("cpu", copy=copies)) for item, tensor in tensors]))
                for path, key, (objects, tensors) in buckets
            ]
        self.num_bytes = sum(
            sum(tensor.nbytes for _, tensor in tensors) + sum(data.getbuffer().nbytes for _, data in objects)
            for _, _, (objects, tensors) in self._buckets
        )  # that this rank writes of the state
        self._files = [Path(path) for path, _, _ in self._buckets]
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)

    def start(self) -> None:
        """Has a thread write it."""
        self._thread.start()

    def is_written(self, seconds: float = 0.0) -> bool:
        """Whether this rank's share is, or could not be. Waits for it so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def num_written(self) -> int:
        """Bytes of this rank's files, so far."""
        return sum(path.stat().st_size for path in self._files if path.exists())

    def finish(self) -> None:
        """Writes what says where everything is, when every rank's share is written. Collective.

        Raises:
            CheckpointException: a rank could not write its share; on every rank.
        """
        for step in self._finishing:
            step()

    @property
    def failure(self) -> str | None:
        """Why not everything further is written; None: it is."""
        return self._failure

    def _write(self) -> None:
        written: dict[int, Any] | Exception = {}
        for number, bucket in enumerate(self._buckets):
            answers, counts = queue.Queue[Any](), queue.Queue[int]()
            counts.put(number)  # which it takes when it is done
            _WRITE(self._transforms, number, bucket, answers, counts, True)
            _, found = answers.get_nowait()
            if isinstance(found, Exception):
                written = _cause(found, self._files[number])
                break
            written[number] = found
        self._buckets = []
        if self._results is not None:
            self._results.put(written)
        try:
            if not isinstance(written, Exception):
                self.checksums = checksums_of(self._files)
            if self._further is not None:
                self._further()
            self._failure = None
        except OSError as error:
            self._failure = str(error)


def _cause(error: Exception, file: Path) -> Exception:
    """What the system said: where a disk is full torch says no more than that its archive has another length."""
    said: BaseException | None = error
    while said is not None:
        if isinstance(said, OSError) and said.errno is not None:
            return OSError(said.errno, said.strerror, str(file))
        said = said.__cause__ or said.__context__
    return error
