"""Asks every contract, and writes what came out: `make contracts`.

    python -m tests.contracts --out docs/contracts.txt

Each group runs in a process of its own. The exit status is 1 if a contract does not hold.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.contracts.te_source import te_version

REPOSITORY = Path(__file__).resolve().parent.parent.parent
OWN, TESTS = "tests/contracts/check_{}.py", "tests/test_{}.py"
GROUPS = {
    "packages, imports, calls, overrides": [OWN.format("package")],
    "private names": [TESTS.format("private_names")],
    "vLLM": [OWN.format("vllm"), TESTS.format("engine_arguments")],
    "Transformer Engine's source": [OWN.format("transformer_engine")],
    "Megatron-Core on a CPU": [
        OWN.format("megatron"),
        *map(TESTS.format, ("policy", "gradients", "layouts", "checkpoint")),
    ],
}
PACKAGES = ("torch", "vllm", "megatron-core", "transformers", "triton")


@dataclass
class Contract:
    """A test function, with all its parameters."""

    file: str
    name: str
    cases: int = 0
    broken: tuple[str, ...] = ()  # ids of parameters, "" without
    skipped: int = 0

    @property
    def line(self) -> str:
        """As the report has it."""
        words = self.name.removeprefix("test_").replace("_", " ")
        times = f" ({self.cases} cases)" if self.cases > 1 else ""
        which = ", ".join(filter(None, self.broken))
        state = "BROKEN" if self.broken else "skipped" if self.skipped == self.cases else "ok"
        return f"{state:<8}{self.file}: {words}{times}{f': {which}' if which else ''}"


def contracts(results: xml.Element) -> list[Contract]:
    """Those of one run of pytest, in its order."""
    found: dict[tuple[str, str], Contract] = {}
    for case in results.iter("testcase"):
        name, _, parameters = case.get("name", "").partition("[")
        file = case.get("classname", "").rpartition(".")[2] or name
        contract = found.setdefault((file, name), Contract(file, name))
        contract.cases += 1
        if case.find("failure") is not None or case.find("error") is not None:
            contract.broken += (parameters.removesuffix("]").replace(f"{REPOSITORY}/", ""),)
        contract.skipped += case.find("skipped") is not None
    return list(found.values())


def ask(files: Iterable[str]) -> tuple[list[Contract], bool]:
    """The contracts of some files, and whether the run itself was as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "results.xml"
        words = [sys.executable, "-m", "pytest", "--no-header", f"--junitxml={report}", *files]
        status = subprocess.run(words, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        found = contracts(xml.parse(report).getroot()) if report.is_file() else []
    return found, status in (0, 1) and bool(found)


def report(groups: dict[str, list[Contract]], today: datetime.date) -> Iterator[str]:
    """The lines of docs/contracts.txt."""
    yield "What is used of the packages for GPUs, asked of them on a machine without one. `make contracts` writes this."
    yield f"{today}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    yield ", ".join([*versions, f"transformer-engine {te_version()} (its Python source)"])
    for title, found in groups.items():
        yield f"\n{title}"
        yield from (contract.line for contract in found)
    every = [contract for found in groups.values() for contract in found]
    broken = sum(bool(contract.broken) for contract in every)
    cases = sum(contract.cases for contract in every)
    yield f"\n{len(every)} contracts of {cases} cases, {broken} broken"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    groups: dict[str, list[Contract]] = {}
    for title, files in GROUPS.items():
        print(f"== {title}", flush=True)
        groups[title], ran = ask(files)
        if not ran:
            sys.exit(f"{title}: pytest did not run to its end; {out} stays as it was")
    lines = list(report(groups, datetime.date.today()))
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(any(contract.broken for found in groups.values() for contract in found))


if __name__ == "__main__":
    main()
