"""The accelerator of this process, as far as a choice of layers or precision depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch


@dataclass(frozen=True)
class Accelerator:
    """A graphics card and the software it is used with."""

    name: str
    capability: tuple[int, int]  # CUDA compute capability: (8, 9) Ada, (9, 0) Hopper, (10, 0) Blackwell
    toolkit: str  # CUDA version that torch was built for, such as "12.9"
    te_version: str | None  # of Transformer Engine, None where it is not installed


def find_accelerator(device: torch.device) -> Accelerator | None:
    """What `device` is; None for the CPU."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    return Accelerator(
        name=properties.name,
        capability=(properties.major, properties.minor),
        toolkit=torch.version.cuda,
        te_version=_transformer_engine_version(),
    )


def _transformer_engine_version() -> str | None:
    """From the package's metadata: importing Transformer Engine takes seconds, and a broken one says why when it is
    imported to be used."""
    try:
        return version("transformer_engine")
    except PackageNotFoundError:
        return None
