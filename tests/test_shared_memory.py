"""Names of shared memory: an engine's own go when it has started, and those of the dead with the next start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.rollout.vllm import shared_memory
from megatron_sr1.rollout.vllm.shared_memory import new_job, take_back, take_back_left_behind


def test_names_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours, another = new_job(), new_job()
    assert ours != another and f"-{os.getpid()}-" in ours
    _, namespace, _, token = ours.split("-")
    elsewhere = f"megatron_sr1-{int(namespace) + 1}-{dead.pid}-{token}-tp:0-0-1_0"  # of another container
    left = f"megatron_sr1-{namespace}-{dead.pid}-{token}-tp:0-0-1_1"
    kept = [f"{another}-tp:0-0-1_0", elsewhere, "others", "megatron_sr1-odd-name", f"megatron_sr1-{namespace}-x-y-z"]
    for name in (f"{ours}-tp:0-0-1_0", f"{ours}-tp:0-0-1_1", f"{ours}-tp:0-2-3_0", left, *kept):
        (tmp_path / name).touch()
    take_back([f"{ours}-tp:0-0-1"])
    take_back_left_behind()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f"{ours}-tp:0-2-3_0"}, "another engine's stay"


def test_where_there_is_no_such_folder_nothing_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path / "absent")
    take_back(["a"])
    take_back_left_behind()
    assert not (tmp_path / "absent").exists()
