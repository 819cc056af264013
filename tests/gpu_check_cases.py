"""Checks of gpu-check that do one thing each, as commands; and the command itself with them, as a process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.runner import Check

_REPORT = """
import sys, time
from pathlib import Path
from benchmarks.gpu_check.report import Report, Table
words = sys.argv
report, folder = Path(words[words.index("--report") + 1]), Path(words[words.index("--folder") + 1])
"""
DRIVER = """
import sys
from pathlib import Path
from benchmarks.gpu_check.__main__ import main
from tests.gpu_check_cases import fake
names, work, out = sys.argv[1].split(","), Path(sys.argv[2]), sys.argv[3]
sys.exit(main(["--out", out], [fake(name) for name in names], work))
"""
CODE = {
    "environment": "Report({'cards': 'CPU', 'CUDA devices': 0}).write(report)",
    "passes": "Report({'GB/s': 1.5, 'odd': float('nan')}, [Table('t', ('a', 'b'), [('x|y', None)])]).write(report)",
    "breaks": "print('before'); open('/no/such/place/file.txt')",
    "is_wrong": "Report({'found': 1}, wrong=('1 is not 2',)).write(report); sys.exit(1)",
    "lacks": "Report(absent='no such package').write(report); sys.exit(77)",
    "skips_without_a_word": "sys.exit(77)",
    "is_killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '600']); (folder / 'child').write_text(str(child.pid)); "
        "print('waiting', flush=True); time.sleep(600)"
    ),
    "takes_a_second": "time.sleep(1)",
}


def fake(name: str, limit_s: float = 60.0, *, needs_cuda: bool = False) -> Check:
    """One of CODE."""
    return Check(name, f"it {name}", (sys.executable, "-c", _REPORT + CODE[name]), limit_s, needs_cuda)


def driver(names: Sequence[str], work: Path, out: Path) -> list[str]:
    """gpu-check with these instead of its own."""
    return [sys.executable, "-c", DRIVER, ",".join(names), str(work), str(out)]
