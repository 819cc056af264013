"""Whether what a machine or image has already goes with constraints-gpu.txt: the first step of the Dockerfile.

    python tools/check_gpu_base.py constraints-gpu.txt

A line for each thing with what was found and what is wanted; the exit status is 1 if one of them does not fit. Packages
that are not there will be installed. Those that are there stay, if their version is the wanted one: a development
version, such as vendors' images have, satisfies no pin.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

PYTHON = "3.12"
KEPT = ("torch", "transformer-engine", "megatron-core", "vllm")  # what an image may have brought


def wanted_version(constraints: str, package: str) -> str:
    """The version that the file pins.

    Raises:
        ValueError: it pins none, or several.
    """
    found = re.findall(rf"^{re.escape(package)}==(\S+)", constraints, flags=re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"constraints-gpu.txt has {len(found)} versions of {package}, not one: run tools/pin_gpu.py")
    return found[0]


def found_version(package: str) -> str | None:
    """The installed version; None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfies(found: str | None, wanted: str) -> bool:
    """As `package==wanted` decides: 2.14.0+cu130 is a 2.14.0, 2.14.0a0+1f2e3d is none."""
    return found is None or found == wanted or found.startswith(f"{wanted}+")


def compare(constraints: str) -> list[tuple[bool, str]]:
    """For each thing, whether it fits, and a line that says it."""
    python = ".".join(map(str, sys.version_info[:2]))
    lines = [(python == PYTHON, f"Python: found {python}, wanted {PYTHON}")]
    for package in KEPT:
        found, wanted = found_version(package), wanted_version(constraints, package)
        lines.append((satisfies(found, wanted), f"{package}: found {found or 'none'}, wanted {wanted}"))
    return lines


def main() -> None:
    """The command line."""
    try:
        lines = compare(Path(sys.argv[1]).read_text())
    except (IndexError, OSError, ValueError) as error:
        sys.exit(f"check_gpu_base.py needs constraints-gpu.txt: {error}")
    for fits, line in lines:
        print("ok   " if fits else "WRONG", line)
    if not all(fits for fits, _ in lines):
        sys.exit("This image does not fit: choose another BASE_IMAGE, or pins that vLLM and this image both allow.")


if __name__ == "__main__":
    main()
