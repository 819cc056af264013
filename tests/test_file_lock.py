"""One process at a time in a folder, also where the file system has no flock."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from megatron_sr1.file_lock import lock_file


@pytest.fixture(params=[errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_flock_is_used_where_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with warnings.catch_warnings(action="error"), lock_file(path) as mine, lock_file(path) as other:
        assert (mine, other) == (True, False)
        assert list(tmp_path.iterdir()) == [path]
    with lock_file(path) as again:
        assert again


def test_a_warning_and_another_lock_without_flock(no_flock: None, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.warns(UserWarning, match=r"without flock.*lock\.owner"), lock_file(path) as mine:
        with pytest.warns(UserWarning, match="without flock"), lock_file(path) as other:
            assert (mine, other) == (True, False)
        owner = tmp_path / "lock.owner"
        assert owner.read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert not owner.exists()
    with pytest.warns(UserWarning), lock_file(path) as again:
        assert again


def test_a_lock_is_given_back_after_an_error(no_flock: None, tmp_path: Path) -> None:
    with pytest.warns(UserWarning), pytest.raises(KeyError), lock_file(tmp_path / "lock"):
        raise KeyError
    with pytest.warns(UserWarning), lock_file(tmp_path / "lock") as held:
        assert held


@pytest.mark.parametrize(
    ("host", "gone", "held"),
    [
        (socket.gethostname(), True, True),
        (socket.gethostname(), False, False),
        ("elsewhere", True, False),
        ("", True, False),
    ],
)
def test_only_a_lock_of_a_process_that_is_gone_is_taken_over(
    host: str, gone: bool, held: bool, no_flock: None, tmp_path: Path
) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    if gone:
        process.communicate()
    try:
        (tmp_path / "lock.owner").write_text(f"{host} {process.pid}\n")
        with pytest.warns(UserWarning), lock_file(tmp_path / "lock") as mine:
            assert mine == held
        assert (tmp_path / "lock.owner").exists() == (not held)
        assert len(list(tmp_path.iterdir())) == (1 if held else 2), "nothing is left aside"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.filterwarnings("ignore:.*without flock")
def test_whoever_waits_gets_it(no_flock: None, tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with lock_file(tmp_path / "lock", wait=True) as held:
            order.append(f"second {held}")

    with lock_file(tmp_path / "lock") as held:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append(f"first {held}")
    thread.join()
    assert order == ["first True", "second True"]


def test_other_errors_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(file: object, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), lock_file(tmp_path / "lock"):
        pass
