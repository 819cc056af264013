"""Names of torch that are not its public interface, each with what it is for and why no public name does.

Seen in torch 2.13.0 and 2.14.0. No other file of the package uses such a name; tests/test_private_names.py finds the
ones that an upgrade has moved.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.distributed_c10d import AllgatherOptions, _get_default_store  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.serialization import _get_layout
from torch.utils._device import _device_constructors

# Where a checkpoint's piece lies: file, offset, length. `Metadata.storage_data` holds nothing else, and
# `FileSystemWriter` offers no way to say it for a file that another writer has filled.
StorageInfo = _StorageInfo

# What a checkpoint's `.metadata` pickles beside public classes: a tensor's memory format, the place of a piece, the
# beginning of a rank's file names, and the function that a layout comes back through. A loader that allows only known
# classes has to name them.
METADATA_CLASSES = (_MEM_FORMAT_ENCODING, _StorageInfo, _StoragePrefix, _get_layout)

# Ends the names under which a module's `get_extra_state` enters its state dict. torch documents the two methods, not
# the name.
EXTRA_STATE = _EXTRA_STATE_KEY_SUFFIX


def remember_factories() -> None:
    """Lets `with torch.device(...)` go on recognising torch's factories after they are replaced.

    It recognises them by identity, from a set that it makes at first use: nothing public makes it earlier.
    """
    _device_constructors()


def fake_store() -> Store:
    """The store of the backend "fake", whose collectives do nothing.

    Importing the module registers the backend. The public ones all wait for the other ranks.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def job_store() -> Store:
    """The store through which the ranks of the default group have met.

    torch hands it to nobody: a second one would need a port, or a file, that the ranks have to agree about first.
    """
    return _get_default_store()


def file_view(stream: IO[bytes], offset: int, length: int) -> IO[bytes]:
    """The bytes [offset, offset + length) of a file as a file: one piece of a checkpoint, as its reader opens it.

    `torch.load` takes a whole file; copying each piece into memory first would hold it twice.
    """
    view: Any = _create_file_view  # which takes and gives what it calls IOBase
    return view(stream, offset, length)


def all_gather_within(group: ProcessGroup, outputs: list[Tensor], value: Tensor, seconds: float) -> None:
    """An all-gather that gives up sooner than its group does, which public collectives cannot.

    Raises:
        RuntimeError: another rank has not come within `seconds`.
    """
    options = AllgatherOptions()
    options.timeout = datetime.timedelta(seconds=seconds)
    group.allgather([outputs], [value], options).wait()


class FixedDtypeBuffers(torch.nn.Module):
    """A module whose own buffers move between devices with it, but keep dtype and values in a model that is cast.

    `to`, `cuda`, `bfloat16` and the rest all go through `_apply`; torch has no public hook there.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in dict(self.named_buffers(recurse=False)).items():
            setattr(self, name, kept[name].to(moved.device))
        return self
