"""Writes constraints-gpu.txt: every version of the gpu extra, its dependencies and the tests', each with its hashes.

uv resolves it, for Linux on x86-64 and Python 3.12, wherever it runs:

    python tools/pin_gpu.py      # again when pyproject.toml changes; then `make contracts`
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
FILE = REPOSITORY / "constraints-gpu.txt"
PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_31"  # glibc 2.31 or newer: what the wheels of vLLM's dependencies ask for
SOURCE_BUILD = "transformer-engine-torch"  # no wheel of it is published
HEAD = f"""\
# Linux on x86-64, Python {PYTHON}, CUDA 13. tools/pin_gpu.py writes it; `make setup-gpu` and the Dockerfile install it.
# It is complete, so nothing is left to resolve: pip and uv install it with --no-deps --require-hashes. Then comes the
# project itself, also with --no-deps: in the mode of hashes pip takes no folder.
"""
TESTS = "# Tests: what only they need."
BUILT = "# Built: after everything else, with --no-build-isolation, against the torch above."


def resolve(extras: list[str], constraints: str = "") -> list[dict[str, Any]]:
    """The packages that the project needs with `extras`, as a lock file (PEP 751) lists them."""
    words = ["uv", "pip", "compile", "pyproject.toml", "--format", "pylock.toml", "--quiet", "--no-header"]
    words += ["--python-version", PYTHON, "--python-platform", PLATFORM, "--constraint", "-"]
    words += [word for extra in extras for word in ("--extra", extra)]
    done = subprocess.run(words, cwd=REPOSITORY, input=constraints, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError("uv could not resolve pyproject.toml; what it says is above")
    return tomllib.loads(done.stdout)["packages"]


def line(package: dict[str, Any]) -> str:
    """`name==version` and the hashes of its wheels for the platform, or of its source where that is all there is."""
    name = package["name"]
    files = package.get("wheels") or ([package["sdist"]] if name == SOURCE_BUILD else [])
    if not files:
        raise ValueError(f"{name} {package['version']} has no wheel for {PLATFORM}: bound it in pyproject.toml")
    hashes = sorted({file["hashes"]["sha256"] for file in files})
    return " ".join([f"{name}=={package['version']}", *(f"--hash=sha256:{digest}" for digest in hashes)])


def text() -> str:
    """The file: what runs, what only the tests need, and what is built."""
    packages = resolve(["gpu", "track", "test"])
    pins = "\n".join(f"{package['name']}=={package['version']}" for package in packages)
    needed = {package["name"] for package in resolve(["gpu", "track"], pins)}
    run, tests, built = [], [], []
    for package in packages:
        name = package["name"]
        (built if name == SOURCE_BUILD else run if name in needed else tests).append(line(package))
    return HEAD + "\n".join([*run, TESTS, *tests, BUILT, *built]) + "\n"


if __name__ == "__main__":
    try:
        FILE.write_text(text())
    except FileNotFoundError:
        sys.exit("uv is not installed: pip install uv")
    except ValueError as error:
        sys.exit(str(error))
