"""Every test marked gpu, on the card: pytest over the whole tests folder, so that none can be forgotten."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_check.private import REPOSITORY
from benchmarks.gpu_check.report import Absent, Report, Table


def command(junit: Path) -> list[str]:
    """No file and no name is picked: the mark alone decides. A file that cannot be imported is one failure."""
    options = ["--no-header", "-rA", "--continue-on-collection-errors", f"--junitxml={junit}"]
    return [sys.executable, "-m", "pytest", "-m", "gpu", *options, "tests"]


def run(folder: Path) -> Report:
    """Counts by file. A test that failed or was skipped is named; all skipped is no pass."""
    junit = folder / "tests.xml"
    status = subprocess.run(command(junit), cwd=REPOSITORY, check=False).returncode
    if not junit.is_file():
        return Report(wrong=(f"pytest ended with {status} and wrote no result",))
    return judged(list(_cases(junit)), status)


def judged(cases: list[tuple[str, str, str, str]], status: int) -> Report:
    """The report on (file, name, outcome, why) of each test.

    Raises:
        Absent: every test was skipped.
    """
    counts = Counter(outcome for _, _, outcome, _ in cases)
    if cases and counts["skipped"] == len(cases):
        raise Absent(f"all {len(cases)} tests were skipped: {cases[0][3]}")
    by_file = {file: Counter(outcome for other, _, outcome, _ in cases if other == file) for file, *_ in cases}
    rows = [(file, *(found[name] for name in ("passed", "failed", "skipped"))) for file, found in by_file.items()]
    tables = [Table("tests", ("file", "passed", "failed", "skipped"), rows)]
    lacking = [(name, outcome, why) for _, name, outcome, why in cases if outcome != "passed"]
    if lacking:
        tables.append(Table("not passed", ("test", "outcome", "why"), lacking))
    wrong = [f"{counts['failed']} of {len(cases)} tests failed"] if counts["failed"] else []
    if not cases:
        wrong.append("pytest found no test that is marked gpu")
    elif status and not wrong:
        wrong.append(f"pytest ended with {status}")
    return Report({name: counts[name] for name in ("passed", "failed", "skipped")}, tables, wrong)


def _cases(junit: Path) -> Iterator[tuple[str, str, str, str]]:
    for case in ElementTree.parse(junit).iter("testcase"):
        outcome, why = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                why = (child.get("message") or "").splitlines()[0][:200] if child.get("message") else ""
        yield case.get("classname", ""), case.get("name", ""), outcome, why
