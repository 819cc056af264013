"""Ranks that wait for each other say so; one that ends by a mistake, or is asked to stop, ends all in one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workspace import REPOSITORY

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": REPOSITORY}
PROGRAM = """
import os, sys, time
from pathlib import Path
from torch import distributed
from megatron_sr1.cli.command import one_line_for_mistakes
from megatron_sr1.platform import joining, run_on_ranks

joining.SAY_EVERY = 0.5

def mistaken(folder):
    if distributed.get_rank() == 1:
        raise {error}
    distributed.barrier()

def busy(folder):
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    (Path(folder) / f"ready{{rank}}").touch()
    time.sleep(100)

def imported(folder):
    name = sys.modules.get("slow_module")
    (Path(folder) / f"id{{distributed.get_rank()}}").write_text(str(getattr(name, "PROCESS", None)))

def joined(folder):  # as start_platform does it, which would import Megatron-Core first
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    joining.join(joining.open_store("127.0.0.1", port, rank), rank, 3, "gloo")
    busy(folder)

def main():
    with one_line_for_mistakes("test"):
        run_on_ranks({function}, int(sys.argv[2]), sys.argv[1], imports=["slow_module"])

if __name__ == "__main__":
    main()
"""


SLOW_MODULE = """
import os, time
from pathlib import Path
PROCESS = os.getpid()
Path(__file__).with_name("importing").write_text(str(PROCESS))
time.sleep({seconds})
"""


def start(
    folder: Path, function: str, num_ranks: int, *, error: str = "", import_seconds: float = 0, **variables: str
) -> subprocess.Popen[str]:
    script = folder / f"{function}.py"
    script.write_text(PROGRAM.format(function=function, error=error))
    (folder / "slow_module.py").write_text(SLOW_MODULE.format(seconds=import_seconds))
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{folder}", "GLOO_SOCKET_IFNAME": "lo", **variables}
    words = [sys.executable, str(script), str(folder), str(num_ranks)]
    return subprocess.Popen(words, env=environment, start_new_session=True, **PIPES)


def wait_for_file(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_a_mistake_on_one_rank_is_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "mistaken", 2, error='OSError(28, "No space left on device", "/full/file")')
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2, printed
    (line,) = (line for line in printed.splitlines() if "megatron-sr1 test" in line)
    assert line.startswith("megatron-sr1 test: /full/file: No space left on device. Make room")
    assert "Traceback" not in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_before_the_first_step_ends_them_in_a_line(number: signal.Signals, tmp_path: Path) -> None:
    """As a terminal sends Ctrl-C, and a cluster its request: also to the server that the ranks are forked from."""
    process = start(tmp_path, "busy", 2)
    for rank in range(2):
        wait_for_file(tmp_path / f"ready{rank}", process)
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "asked to stop outside of the steps" in printed
    assert "Traceback" not in printed and len(printed.splitlines()) < 5, printed


def test_ranks_of_a_cpu_share_what_they_import(tmp_path: Path) -> None:
    process = start(tmp_path, "imported", 2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    server, *others = {(tmp_path / name).read_text() for name in ("importing", "id0", "id1")}
    assert not others and int(server) != process.pid


def test_ctrl_c_while_the_modules_are_imported_ends_in_a_line(tmp_path: Path) -> None:
    process = start(tmp_path, "busy", 2, import_seconds=100)
    wait_for_file(tmp_path / "importing", process)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)  # the end of the output is the server's end, too
    assert process.returncode == 75, printed
    assert "interrupted; the same command goes on" in printed and len(printed.splitlines()) == 1, printed


@pytest.mark.parametrize("import_seconds", [0, 100])
def test_nothing_outlives_a_killed_launcher(import_seconds: float, tmp_path: Path) -> None:
    """Neither ranks nor the server that they are forked from: these hold the other end of the output."""
    process = start(tmp_path, "busy", 2, import_seconds=import_seconds)
    for name in ("importing",) if import_seconds else ("ready0", "ready1"):
        wait_for_file(tmp_path / name, process)
    process.kill()
    process.communicate(timeout=60)


def test_ctrl_c_of_one_rank_is_a_line_too(tmp_path: Path) -> None:
    process = start(tmp_path, "busy", 1)
    wait_for_file(tmp_path / "ready0", process)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "interrupted; the same command goes on" in printed and "Traceback" not in printed


def test_ranks_say_how_many_are_missing(tmp_path: Path) -> None:
    """First the second rank alone, which looks for the first; then both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "3", "MASTER_PORT": port}
    ranks = [start(tmp_path, "joined", 3, **common, RANK="1")]
    said = ""
    try:
        while "rank 1 has waited" not in said:
            said = ranks[0].stdout.readline()
            assert said, "it ended"
        assert f"for rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT={port}" in said
        ranks.append(start(tmp_path, "joined", 3, **common, RANK="0"))
        while "waiting for 1 of 3 ranks" not in said:
            said = ranks[1].stdout.readline()
            assert said, "it ended"
        ranks.append(start(tmp_path, "joined", 3, **common, RANK="2"))
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(3)):
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


PATIENCE = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed
from megatron_sr1.platform import Platform, run_on_ranks
from megatron_sr1.platform.accelerator import find_accelerator

def work(folder, longest):
    device = torch.device("cpu")
    platform = Platform(device, distributed.get_rank(), 2, find_accelerator(device))
    said = platform.on_main(lambda: time.sleep(6) or "done", longest=longest)
    (Path(folder) / f"{longest}{platform.rank}").write_text(said)

if __name__ == "__main__":
    for longest in (timedelta(minutes=2), None):
        run_on_ranks(work, 2, sys.argv[1], longest, timeout=timedelta(seconds=2))
"""


def test_ranks_wait_as_long_as_the_timeout_says_and_longer_for_what_is_known_to_take_long(tmp_path: Path) -> None:
    script = tmp_path / "patience.py"
    script.write_text(PATIENCE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert {path.name: path.read_text() for path in tmp_path.glob("*:*")} == dict.fromkeys(
        ("0:02:000", "0:02:001"), "done"
    )
    assert done.returncode != 0 and "Timed out waiting" in done.stderr, "without `longest` the timeout holds"


def test_what_makes_a_process_deterministic_is_refused_where_the_environment_says_otherwise() -> None:
    script = (
        "import os, torch; from megatron_sr1.platform import make_deterministic; make_deterministic();"
        "print(os.environ['NVTE_ALLOW_NONDETERMINISTIC_ALGO'], os.environ['CUBLAS_WORKSPACE_CONFIG'],"
        "torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NVTE_", "CUBLAS_"))}
    run = [sys.executable, "-c", script]
    options = {"capture_output": True, "text": True, "timeout": 120, "cwd": REPOSITORY}
    assert subprocess.run(run, env=environment, **options).stdout.split() == ["0", ":4096:8", "True", "False"]
    contrary = subprocess.run(run, env=environment | {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}, **options)
    assert contrary.returncode and "NVTE_ALLOW_NONDETERMINISTIC_ALGO=1 contradict each other" in contrary.stderr
