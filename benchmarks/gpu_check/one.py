"""One check in this process: `python -m benchmarks.gpu_check.one MODULE --report FILE --folder FOLDER`.

The module is a neighbour of this file with `run(folder) -> Report`. An error of it is the end of this process; what
it finds wrong, and what it cannot look at here, is in the report and in the exit status.
"""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType

from benchmarks.gpu_check.report import Absent, Report
from benchmarks.gpu_check.runner import ABSENT_STATUS


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)
    try:
        report: Report = import_module(f"benchmarks.gpu_check.{args.module}").run(args.folder)
    except Absent as lack:
        report = Report(absent=str(lack))
    report.write(args.report)
    print(report)
    if report.absent:
        return ABSENT_STATUS
    return 1 if report.wrong else 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends by an exception, so that a check can end what it has put into process groups of their own."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
