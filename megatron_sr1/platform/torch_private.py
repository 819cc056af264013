"""Names of torch that are not its public interface, each with what it is for and why no public name does.

Seen in torch 2.13.0 and 2.14.0. No other file of the package uses such a name; tests/test_private_names.py finds the
ones that an upgrade has moved.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import (
    FileStore,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    ProcessGroup,
    Store,  # pyright: ignore[reportPrivateImportUsage]
)
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


def with_children(module: torch.nn.Module, **children: torch.nn.Module) -> Any:
    """A copy that has all that `module` has, the same parameters and hooks among it, but these children. To set a child
    by its public name would change it in `module` too."""
    made = copy(module)
    made._modules = {**module._modules, **children}
    return made


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


def job_store_copy() -> Store:
    """The same store over a connection of its own, for another thread: a connection serves one question at a time, and
    some take minutes. A store in a file has no connection: that one itself, whose `path` is the file."""
    store: Any = _get_default_store()
    inner = store
    while isinstance(inner, PrefixStore):
        inner = inner.underlying_store
    return inner if isinstance(inner, FileStore) else store.clone()


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


# Attention that also gives the log-sum-exp of its scores, and whose backward takes any: what joining several over the
# same queries needs. `scaled_dot_product_attention` has no log-sum-exp; that of `torch.nn.attention.varlen` has no
# gradient, and its backward is not public.
class Attended(NamedTuple):
    """What the backward of attention is of. The probabilities are exp(score - lse)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor  # of the output
    out: Tensor
    lse: Tensor


Edges = tuple[Tensor, Tensor, int, int]  # cu_seqlens of queries and of keys, [runs + 1] int32, and the longest of each


def padded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """On a CPU. query [B, h, Q, d], key and value [B, g, K, d], mask [B, 1, Q, K] added to the scores -> [B, h, Q, d]
    and log-sum-exp [B, h, Q], fp32."""
    mask = None if mask is None else mask.to(query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )


def padded_attention_backward(
    of: Attended, mask: Tensor | None, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of the same."""
    mask = None if mask is None else mask.to(of.query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        of.grad, of.query, of.key, of.value, of.out, of.lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, edges: Edges, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """On a GPU. query [Nq, h, d], key and value [Nk, g, d], fp16 or bf16 -> [Nq, h, d] and log-sum-exp [Nq, h], fp32.
    The last query of a causal run sees all its keys."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *edges, 0.0, causal, False, scale=scale)
    return out, lse.transpose(0, 1).contiguous()


def varlen_attention_backward(
    of: Attended, edges: Edges, *, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of the same."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=of.query.device)
    with deterministic_kernels():
        return torch.ops.aten._flash_attention_backward(
            of.grad, of.query, of.key, of.value, of.out, of.lse.transpose(0, 1).contiguous(), *edges, 0.0, causal,
            no_dropout, torch.empty(0, device=of.query.device), scale=scale,
        )  # fmt: skip


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Where torch warns of operations that are not deterministic, it refuses them here: FlashAttention's backward is
    deterministic only where it must be, and no more than warned of otherwise."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if warns:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if warns:
            torch.use_deterministic_algorithms(True, warn_only=True)


# Which call has allocated what of the device's memory: https://docs.pytorch.org/memory_viz draws it. The documentation
# of torch names these functions, with their underscores; there are no others.
def record_allocations(*, on: bool) -> None:
    """Has every allocation noted with its stack, or no more."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def dump_allocations(path: str) -> None:
    """Writes what is allocated, and what was since it has been noted."""
    torch.cuda.memory._dump_snapshot(path)
