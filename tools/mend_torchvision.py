"""Lets every program of this environment import torchvision, also beside a torch that it was not compiled for.

    python tools/mend_torchvision.py

`make setup` runs it. The common package index has torchvision for one accelerator alone; beside the CPU build of torch
it stops at its own import, and `from transformers import AutoProcessor` with it. The commands of this project define
what is missing when they start (megatron_sr1/platform/torchvision_ops.py says more); this has every other program do so
at its first import of torchvision. Where torchvision can be imported as it is, nothing is done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = "mended_torchvision"  # a module, and the .pth file that has Python import it when it starts
OPTIONAL = ("torchaudio", "torchcodec")  # compiled for the same accelerator; transformers imports what it finds
CODE = '''"""Written by tools/mend_torchvision.py."""

import importlib.util
import pathlib
import sys


class _Finder:
    """Finds torchvision as the others do; before its first line runs, what it lacks is defined."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        found = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (_define(), run(module))
        return spec


def _define():
    package = importlib.util.find_spec("megatron_sr1")
    if package is not None:
        file = pathlib.Path(package.submodule_search_locations[0], "platform", "torchvision_ops.py")
        spec = importlib.util.spec_from_file_location("mended_torchvision_ops", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # it keeps the operators
        spec.loader.exec_module(module)  # by itself: its package imports all of the platform
        module.define_missing_torchvision_ops()


sys.meta_path.insert(0, _Finder())
sys.modules.update(dict.fromkeys(@BROKEN@))  # None: as if they were not installed
'''


def can_import(package: str) -> bool:
    """Whether a new process imports it."""
    return subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode == 0


def write_hook(folder: Path) -> None:
    """`folder`: one whose .pth files Python reads as it starts."""
    broken = [package for package in OPTIONAL if not can_import(package)]
    (folder / f"{HOOK}.py").write_text(CODE.replace("@BROKEN@", repr(broken)))
    (folder / f"{HOOK}.pth").write_text(f"import {HOOK}\n")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    folder = Path(sysconfig.get_path("purelib"))
    for suffix in ("py", "pth"):
        (folder / f"{HOOK}.{suffix}").unlink(missing_ok=True)  # of an earlier installation
    if can_import("torchvision"):
        return
    write_hook(folder)
    if not can_import("torchvision"):
        sys.exit(f"torchvision cannot be imported, not even with {folder / HOOK}.py: import it to see why.")
    print(f"torchvision is not compiled for this torch: {folder / HOOK}.py defines what is missing")


if __name__ == "__main__":
    main()
