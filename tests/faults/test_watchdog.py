"""Ranks that hang, are stopped or are killed: all end soon, the first cause is said, and each says where it stood."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_sr1.config import Config
from megatron_sr1.phases import WAIT, Phases, during
from megatron_sr1.platform import Platform
from megatron_sr1.platform.board import FolderBoard
from megatron_sr1.platform.watchdog import HUNG_STATUS, Watchdog
from tests.workspace import REPOSITORY

SOON = 60.0  # seconds in which all ranks are to end, when something is found
SCRIPT = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
from megatron_sr1.phases import during
from megatron_sr1.platform import run_on_ranks, start_platform, watched_rank
from megatron_sr1.platform import watchdog

watchdog._TICK_SECONDS, watchdog._TALK_SECONDS, watchdog._GRACE_SECONDS = 0.2, 0.2, 1.5

def work(folder, hangs):
    platform = start_platform(timedelta(minutes=10))
    place = (platform.rank, platform.world_size)
    with watched_rank(during, {"read": 8.0 if hangs else 600.0}, 600.0, 5.0, Path(folder), *place):
        during.step = 3
        platform.ranks.meet()
        Path(folder, f"pid{platform.rank}").write_text(str(os.getpid()))
        while True:
            with during("read"):
                if hangs and platform.rank == 1:
                    time.sleep(600)
                platform.ranks.meet()
            time.sleep(0.1)

if __name__ == "__main__":
    run_on_ranks(work, int(sys.argv[2]), sys.argv[1], sys.argv[3] == "hangs")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "work.py"
    path.write_text(SCRIPT)
    return path


def process_ids(folder: Path, num_ranks: int, process: subprocess.Popen[str]) -> list[int]:
    """When all ranks are at work."""
    paths = [folder / f"pid{rank}" for rank in range(num_ranks)]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_text() for path in paths):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    time.sleep(1)  # until all have heard of each other
    return [int(path.read_text()) for path in paths]


def stood(folder: Path) -> dict[int, str]:
    """What each rank has written, by rank."""
    return {int(path.stem.removeprefix("rank_")): path.read_text() for path in (folder / "hang").iterdir()}


def is_alive(process_id: int) -> bool:
    return psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE


def start(script: Path, num_ranks: int, how: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), str(script.parent), str(num_ranks), how]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=variables, start_new_session=True, **pipe)


def test_a_rank_that_hangs_is_named_and_all_end(script: Path) -> None:
    folder = script.parent
    process = start(script, 3, "hangs")
    ranks = process_ids(folder, 3, process)
    printed = process.communicate(timeout=SOON)[0]
    assert process.returncode == HUNG_STATUS, printed
    (line,) = printed.strip().splitlines()
    assert line.startswith("megatron-sr1: rank 1 on ")
    assert "hangs (step 4: read): " in line and "of read, where 8 s" in line
    assert not any(map(is_alive, ranks))
    found = stood(folder)
    cause = line.split(". Where")[0].removeprefix("megatron-sr1: ")
    assert found.keys() == {0, 1, 2} and all(f"cause: {cause}\n" in text for text in found.values())
    assert "time.sleep" not in found[1] and "in work" in found[1], "the stack of the main thread"
    assert f"rank 0 at step 4: read, {WAIT}" in found[0] and "in meet" in found[0]


def test_a_rank_that_is_stopped_is_found_to_be_stopped(script: Path) -> None:
    process = start(script, 2, "works")
    ranks = process_ids(script.parent, 2, process)
    os.kill(ranks[1], signal.SIGSTOP)
    printed = process.communicate(timeout=SOON)[0]
    assert process.returncode == HUNG_STATUS, printed
    (line,) = printed.strip().splitlines()
    assert f"process {ranks[1]}, last at step 4: " in line and "is stopped (SIGSTOP) for" in line
    assert not any(map(is_alive, ranks)), "the stopped one, too"


def start_as_torchrun(script: Path, num_ranks: int, port: int) -> list[subprocess.Popen[str]]:
    """Ranks that nobody looks after: they meet over TCP."""
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = map(str, range(num_ranks))
    return [start(script, num_ranks, "works", RANK=rank, LOCAL_RANK=rank, **common) for rank in ranks]


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize(("victim", "number"), [(2, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_without_a_launcher_the_others_see_who_is_gone(script: Path, victim: int, number: signal.Signals) -> None:
    """Rank 0 keeps the store through which the ranks speak: when it is stopped, nothing answers them."""
    processes = start_as_torchrun(script, 3, free_port())
    try:
        ranks = process_ids(script.parent, 3, processes[0])
        begun = time.monotonic()
        os.kill(ranks[victim], number)
        printed = "".join(process.communicate(timeout=SOON)[0] for process in processes)
        assert time.monotonic() - begun < (30 if number == signal.SIGKILL else SOON)
        statuses = {rank: process.returncode for rank, process in enumerate(processes) if rank != victim}
        assert set(statuses.values()) == {HUNG_STATUS}, (statuses, printed)
        what = "has ended without a word" if number == signal.SIGKILL else "is stopped (SIGSTOP)"
        first = next(line for line in printed.splitlines() if line.startswith("megatron-sr1: "))
        assert f"rank {victim} on " in first and what in first
        assert not is_alive(ranks[victim])
    finally:
        for process in processes:
            process.kill()


# ---------------------------------------------------------------- in this process
class Ended(Exception):
    """In place of the end of this process."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The statuses that this process would have ended with."""
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("megatron_sr1.platform.watchdog._TICK_SECONDS", 0.02)
    monkeypatch.setattr("megatron_sr1.platform.watchdog._TALK_SECONDS", 0.02)
    for name in ("_GRACE_SECONDS", "_UNWINDING_SECONDS"):
        monkeypatch.setattr(f"megatron_sr1.platform.watchdog.{name}", 0.2)
    yield statuses


def wait_for(statuses: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not statuses and time.monotonic() < deadline:
        time.sleep(0.01)


def watched(phases: Phases, folder: Path, limits: dict[str, float], idle: float = 100.0, **how: object) -> Watchdog:
    return Watchdog(phases, limits, idle, 0.3, folder, **how)  # type: ignore[arg-type]


def test_each_phase_has_its_limit_and_whatever_has_none_shares_one(tmp_path: Path, ended: list[int]) -> None:
    phases = Phases()
    with watched(phases, tmp_path, {"save": 0.3}), phases("rollout"):
        for _ in range(10):
            with phases("save"):  # often, and never for long
                time.sleep(0.06)
        assert not ended
        with phases("save"):
            for _ in range(100):  # what happens within it does not begin it anew
                with phases(WAIT):
                    time.sleep(0.01)
        assert ended == [HUNG_STATUS]
    assert "of save, where 0 s are allowed" in stood(tmp_path)[0]
    ended.clear()
    with watched(phases, tmp_path, {"save": 0.3}), phases("save"):
        for _ in range(20):  # bytes come
            time.sleep(0.05)
            phases.moved()
        assert not ended


def test_what_has_no_limit_may_not_stand_still_but_waiting_and_own_patience_may(
    tmp_path: Path, ended: list[int]
) -> None:
    phases = Phases()
    with watched(phases, tmp_path, {}, idle=0.3):
        with phases(WAIT):  # the group's own timeout ends that
            time.sleep(0.6)
        with phases("judge", math.inf):
            time.sleep(0.6)
        thread = threading.Thread(target=lambda: phases("elsewhere").__enter__())
        thread.start()
        thread.join()
        assert not ended and not phases.open, "other threads' phases are not this one's"
        with phases("rollout"):
            wait_for(ended, 3)
    assert ended == [HUNG_STATUS] and "of rollout, where 0 s" in stood(tmp_path)[0]


def test_an_error_that_one_rank_has_alone_ends_the_others_who_hear_of_it(tmp_path: Path, ended: list[int]) -> None:
    board = FolderBoard(tmp_path)
    with pytest.raises(RuntimeError), watched(Phases(), tmp_path, {}, rank=1, num_ranks=2, board=board):
        raise RuntimeError("of this\nrank")
    assert board.read("cause") == "rank 1 failed (RuntimeError: of this rank)"
    board.write_first("cause", "another")
    with watched(Phases(), tmp_path, {}, rank=0, num_ranks=2, board=board):
        wait_for(ended)
    assert ended == [HUNG_STATUS] and "cause: rank 1 failed (RuntimeError: of this rank)" in stood(tmp_path)[0]


def test_ranks_that_are_done_are_not_missed(tmp_path: Path, ended: list[int]) -> None:
    """Of three, the next two end as they should; their last signs stay."""
    board = FolderBoard(tmp_path)
    for rank in (1, 2):
        with watched(Phases(), tmp_path, {}, rank=rank, num_ranks=3, board=board):
            time.sleep(0.1)
        sign = json.loads(board.read(f"rank{rank}") or "")
        assert sign["over"]
        board.write(f"rank{rank}", json.dumps({**sign, "process_id": 2**22 + 1}))  # nobody's
    with watched(Phases(), tmp_path, {}, rank=0, num_ranks=3, board=board):
        time.sleep(1.0)
    assert not ended
    board.write("rank2", json.dumps({**sign, "process_id": 2**22 + 1, "over": False}))
    with watched(Phases(), tmp_path, {}, rank=0, num_ranks=3, board=board):
        wait_for(ended)
    assert ended and "rank 2 on " in stood(tmp_path)[0] and "has ended without a word" in stood(tmp_path)[0]


def test_limits_are_those_of_the_configuration_and_a_judge_has_a_patience_of_its_own(tmp_path: Path) -> None:
    limits = Config().watchdog.seconds(timeout_minutes=10.0, reward_seconds=120.0)
    soon = dict.fromkeys(("read", "engine step", "reward"), 480.0)
    assert limits == {**soon, "sync": 3600.0, "train": 3600.0, "save": 3600.0}
    assert Config().watchdog.seconds(0.1, 1.0)["read"] == 60.0
    assert Config().watchdog.seconds(10.0, math.inf)["reward"] == math.inf
    assert Platform and during.step is None
