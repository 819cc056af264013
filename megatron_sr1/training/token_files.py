"""What the training of a step measures of each token, beside the step's rollouts, for whoever looks at them: nothing is
trained from it.

Each replica writes the responses that it trains, step_000007.tokens.0-of-2.npz and step_000007.tokens.1-of-2.npz. A
measure is a 16-bit float a token.

Shape legend: n response tokens of a response, r responses of a replica, T response tokens of all of these.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GAP, ENTROPY, DEPENDENCY = "gap", "entropy", "dependency/"  # the last with the name of a contrast
_PART = re.compile(r"\.tokens\.(\d+)-of-(\d+)\.npz$")
_KNOWN, _VALUE = "known/", "value/"  # of arrays in a file: [r] bool, and values [T] of the responses that have them
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error, EOFError)


class ResponseName(NamedTuple):
    """A response of a step."""

    group: int
    sample: int
    pass_name: str
    number: int  # among the samples of its pass


@dataclass(frozen=True)
class TokenMeasures:
    """Of one response."""

    ids: int  # `digest_of` its tokens
    values: Mapping[str, Sequence[float]]  # by name, one a token; those alone that are known


@dataclass(frozen=True)
class MeasuredResponse:
    """What is written of a response."""

    name: ResponseName
    ids: Sequence[int]
    values: Mapping[str, Tensor]  # by name, [n] float16 on the CPU; those alone that are known


def write_tokens(
    folder: Path, step: int, responses: Sequence[MeasuredResponse], replica: int = 0, num_replicas: int = 1
) -> None:
    """The part of a replica: whole, or not there. `read_tokens` gets it back.

    Args:
        folder: of the rollouts.

    Raises:
        OSError: it cannot be written.
    """
    arrays: dict[str, Any] = {
        field: np.array([getattr(one.name, field) for one in responses]) for field in ResponseName._fields
    }
    arrays["length"] = np.array([len(one.ids) for one in responses])
    arrays["ids"] = np.array([digest_of(one.ids) for one in responses])
    for name in sorted({name for one in responses for name in one.values}):
        arrays[_KNOWN + name] = np.array([name in one.values for one in responses])
        arrays[_VALUE + name] = torch.cat([one.values[name] for one in responses if name in one.values]).numpy()
    target = folder / f"{_stem(step)}{replica}-of-{num_replicas}.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, target)


def read_tokens(folder: Path, step: int) -> dict[ResponseName, TokenMeasures]:
    """Of all responses of a step that were trained; {} where nothing was saved.

    Raises:
        ValueError: a part is missing or damaged.
    """
    parts = {file: _PART.search(file.name) for file in sorted(folder.glob(f"{_stem(step)}*.npz"))}
    places = [(int(found[1]), int(found[2])) for found in parts.values() if found is not None]
    if sorted(places) != [(number, len(places)) for number in range(len(places))]:
        raise ValueError(f"{folder}/{_stem(step)}*.npz: of its parts some are missing, or others' are among them.")
    found: dict[ResponseName, TokenMeasures] = {}
    for file in parts:
        try:
            own = dict(_read(file))
        except _UNREADABLE as error:
            raise ValueError(f"{file}: it is damaged ({error}).") from error
        if not own.keys().isdisjoint(found):
            raise ValueError(f"{file}: it has responses of another part, so that others' are missing.")
        found |= own
    return found


def _read(file: Path) -> Iterator[tuple[ResponseName, TokenMeasures]]:
    with np.load(file, allow_pickle=False) as arrays:
        columns = {name: arrays[name].tolist() for name in (*ResponseName._fields, "length", "ids")}
        measured = [name.removeprefix(_KNOWN) for name in arrays.files if name.startswith(_KNOWN)]
        known = {name: arrays[_KNOWN + name].tolist() for name in measured}
        values = {name: arrays[_VALUE + name].tolist() for name in measured}
    place = dict.fromkeys(measured, 0)
    for index, length in enumerate(columns["length"]):
        own: dict[str, Sequence[float]] = {}
        for name in measured:
            if known[name][index]:
                own[name] = values[name][place[name] : place[name] + length]
                place[name] += length
        response = ResponseName(*(columns[name][index] for name in ResponseName._fields))
        yield response, TokenMeasures(columns["ids"][index], own)
    if any(place[name] != len(values[name]) for name in measured):
        raise ValueError("its lengths do not fit its values")


def remove_tokens(folder: Path, step: int) -> None:
    """Removes what is there of a step, unfinished parts too."""
    for old in folder.glob(f"{_stem(step)}*"):
        old.unlink(missing_ok=True)


def digest_of(ids: Sequence[int]) -> int:
    """CRC-32 of the tokens of a response: measures of another draw are not taken for those of this one."""
    return zlib.crc32(" ".join(map(str, ids)).encode())


def _stem(step: int) -> str:
    return f"step_{step:06d}.tokens."
