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
CODE = '''"""Written by tools/mend_torchvision.py."""

import importlib.util
import pathlib
import sys


class _Mend:
    """The first import of torchvision comes by here."""

    def find_spec(self, name, path=None, target=None):
        package = name == "torchvision" and importlib.util.find_spec("megatron_sr1")
        if package:
            sys.meta_path.remove(self)
            file = pathlib.Path(package.submodule_search_locations[0], "platform", "torchvision_ops.py")
            spec = importlib.util.spec_from_file_location("mended_torchvision_ops", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)  # by itself: its package imports all of the platform
            module.define_missing_torchvision_ops()
        return None


sys.meta_path.insert(0, _Mend())
'''


def can_import() -> bool:
    """Whether a new process imports torchvision."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    return done.returncode == 0


def write_hook(folder: Path) -> None:
    """`folder`: one whose .pth files Python reads as it starts."""
    (folder / f"{HOOK}.py").write_text(CODE)
    (folder / f"{HOOK}.pth").write_text(f"import {HOOK}\n")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if can_import():
        return
    folder = Path(sysconfig.get_path("purelib"))
    write_hook(folder)
    if not can_import():
        sys.exit(f"torchvision cannot be imported, not even with {folder / HOOK}.py: import it to see why.")
    print(f"torchvision is not compiled for this torch: {folder / HOOK}.py defines what is missing")


if __name__ == "__main__":
    main()
