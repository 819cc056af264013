"""Room for one more checkpoint: made of the oldest, never of the newest, or told a step ahead."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sr1.training.checkpoint_room import make_room, warn_of_next

CAPACITY, SIZE = 450, 100  # of the disk and of each checkpoint, KiB


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints, and room for one and a half."""
    for step in range(1, 4):
        (tmp_path / f"step_{step:06d}").mkdir()
        (tmp_path / f"step_{step:06d}" / "a.distcp").write_bytes(bytes(SIZE << 10))

    def usage(path: Path) -> SimpleNamespace:
        used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        return SimpleNamespace(free=(CAPACITY << 10) - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    (tmp_path / "step_000004.partial-1").mkdir()
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_would_be_removed_afterwards_makes_room_and_no_more(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    surplus = [folder / "step_000001", folder / "step_000002"]
    make_room(folder, 150 << 10, folder / "step_000004.partial-1", lambda: surplus)
    assert len(left(folder)) == 4 and not capsys.readouterr().err, "there is room"
    make_room(folder, 200 << 10, folder / "step_000004.partial-1", lambda: surplus)
    assert left(folder) == ["step_000002", "step_000003", "step_000004.partial-1"]
    assert "takes 0.2 MiB, 0.1 MiB are free: step_000001 is removed" in capsys.readouterr().err


def test_where_it_cannot_fit_it_is_refused_and_the_newest_stays(folder: Path) -> None:
    words = rf"^no space left on {folder}: 0\.2 MiB free, and step_000004 takes 0\.4 MiB\. Make room"
    with pytest.raises(ValueError, match=words):
        make_room(folder, 400 << 10, folder / "step_000004.partial-1", lambda: [folder / "step_000001"])
    assert left(folder) == ["step_000002", "step_000003"], "what is begun gives its room back"


def test_the_next_one_is_told_of_ahead(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_next(folder, 150 << 10, list)
    warn_of_next(folder, 250 << 10, lambda: [folder / "step_000001"])
    assert not capsys.readouterr().err, "the oldest will make room"
    warn_of_next(folder, 251 << 10, lambda: [folder / "step_000001"])
    wanted = f"warning: {folder}: the next checkpoint needs 0.2 MiB, 0.1 MiB are free. Make room.\n"
    assert capsys.readouterr().err == wanted
