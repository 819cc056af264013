"""Lets torchvision be imported beside a torch whose build it was not compiled for.

The torchvision, torchaudio and torchcodec wheels of the common package index are compiled for one accelerator. Beside a
CPU torch their compiled parts do not load: `import torchvision` then stops at the unknown operators `torchvision::nms`
and `torchvision::qnms`, the other two at their libraries. transformers' Qwen-VL processors need the Python part of
torchvision (transforms only, none of its operators); transformers and vLLM import the other two where installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def define_missing_torchvision_ops() -> None:
    """Call before the first import of torchvision, transformers' Qwen-VL classes or vLLM. May be called again.

    Where torchvision's compiled library loads, torchvision is left alone. Where it does not, the two operators get
    their schemas without a kernel: calling one still fails loudly, importing the package works. A torchaudio or
    torchcodec whose library does not load is marked as not importable, which its users treat as not installed.
    """
    if not _torchvision_library_loads() and not _operators_exist():
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _libraries.append(library)
    for package in ("torchaudio", "torchcodec"):
        if package not in sys.modules and importlib.util.find_spec(package) is not None:
            _block_unless_importable(package)


def _operators_exist() -> bool:
    """True where torchvision is imported, or somebody has called this before: tools/mend_torchvision.py may have."""
    try:
        return bool(torch.ops.torchvision.nms)
    except AttributeError:
        return False


def _torchvision_library_loads() -> bool:
    """True too where torchvision is absent: its importer then reports that itself."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return True
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    libraries = [path for folder in folders for path in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd"))]
    try:
        for path in libraries:
            torch.ops.load_library(path)
    except OSError:
        return False
    return bool(libraries)


def _block_unless_importable(package: str) -> None:
    try:
        importlib.import_module(package)
    except OSError:  # what torch.ops.load_library raises
        # None in sys.modules makes every later import raise ModuleNotFoundError, and find_spec answer None.
        sys.modules[package] = None  # type: ignore[assignment]
