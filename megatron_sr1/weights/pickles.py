"""A look into a Megatron checkpoint's pickles before Megatron-Core opens them.

torch.distributed.checkpoint reads `.metadata`, and the objects stored beside the tensors, with a pickle loader that
runs whatever code the file names. Here both are read first with a loader that knows only the classes a checkpoint is
made of.
"""

from __future__ import annotations

import collections
import io
import json
import pathlib
import pickle
import re
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_sr1.platform.torch_private import METADATA_CLASSES

METADATA = ".metadata"
COMMON = "common.pt"  # what is no tensor; from 0.19 on Megatron-Core stores it among the tensors, as _COMMON_OBJECT
_COMMON_OBJECT = "common_state/shard_"
FORMAT = "metadata.json"
BACKEND = "torch_dist"
_CLASSES = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    planner.BytesIOWriteData,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
    planner.WriteItemType,
    collections.OrderedDict,
    torch.Size,
    *METADATA_CLASSES,
)
_ALLOWED: dict[tuple[str, str], Any] = {(item.__module__, item.__qualname__): item for item in _CLASSES} | {
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,  # its name since Python 3.13
}


class ForeignCode(ValueError):
    """A checkpoint asks for code that none needs."""


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _CheckpointUnpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata and no others."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__(stream)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _ALLOWED:
            raise ForeignCode(_foreign(self.path, f"{module}.{name}"))
        return _ALLOWED[module, name]


def read_metadata(folder: Path) -> Metadata:
    """The tensors of a Megatron checkpoint and their places, read without running code of the file's choice.

    Raises:
        ValueError: no such checkpoint, another format, a file that is corrupt or asks for a class it should not.
    """
    path = folder / METADATA
    for file in (folder / FORMAT, path):
        if not file.is_file():
            raise _incomplete(folder, file.name)
    try:
        backend = json.loads((folder / FORMAT).read_text(encoding="utf-8"))["sharded_backend"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FORMAT} is corrupt ({error!r}). Copy the checkpoint again.") from error
    if backend != BACKEND:
        raise ValueError(f"{folder / FORMAT}: the format is {backend!r}, which cannot be read; {BACKEND!r} can.")
    try:
        with path.open("rb") as stream:
            found = _CheckpointUnpickler(stream, path).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({error!r}). Copy the checkpoint again.") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path} holds a {type(found).__name__} where a checkpoint's metadata belongs.")
    if not (folder / COMMON).is_file() and not any(key.startswith(_COMMON_OBJECT) for key in found.state_dict_metadata):
        raise _incomplete(folder, COMMON)
    return found


def _incomplete(folder: Path, name: str) -> ValueError:
    return ValueError(
        f"{folder} is no complete Megatron checkpoint: {name} is missing. Give a folder that hf-to-megatron or a "
        "training run has written."
    )


def check_megatron_dir(folder: str | Path) -> Metadata:
    """Makes sure that Megatron-Core may open a checkpoint: no pickle in it asks for foreign code, no file is short.

    Raises:
        ForeignCode: a pickle asks for it; the message names the file and the class.
        ValueError: anything else that is wrong; the message names the file.
    """
    folder = Path(folder)
    found = read_metadata(folder)
    if (folder / COMMON).is_file():  # Megatron-Core reads it wherever it is
        _check_object(folder / COMMON, (folder / COMMON).read_bytes())
    for index, place in found.storage_data.items():
        path = folder / place.relative_path
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(
                f"{folder / METADATA} puts {index.fqn} outside of the checkpoint: {place.relative_path!r}."
            )
        if not path.is_file() or path.stat().st_size < place.offset + place.length:
            raise ValueError(
                f"{path} is missing or truncated: {index.fqn} should lie at bytes {place.offset} to "
                f"{place.offset + place.length}. Copy the checkpoint again."
            )
        if isinstance(found.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with path.open("rb") as stream:
                stream.seek(place.offset)
                _check_object(path, stream.read(place.length))
    return found


def _check_object(path: Path, content: bytes) -> None:
    """Opens a small object as torch does when it trusts nothing."""
    if not content:
        return  # an object that a layer has nothing to say in
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # torch's own text says how to open the file regardless
        if refused:
            raise ForeignCode(_foreign(path, refused[1])) from None
        raise ValueError(f"{path} is corrupt ({error}). Copy the checkpoint again.") from error


def _foreign(path: Path, name: str) -> str:
    return (
        f"{path} asks for {name}, which no checkpoint needs: opening it could run foreign code. Do not use it unless "
        "you know where it comes from."
    )
