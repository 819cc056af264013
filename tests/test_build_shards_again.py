"""tools/build_shards.py, killed and run again, and its check of what is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_sr1.data.build.journal import Journal, JournalEntry
from megatron_sr1.data.index import index_path, read_index, write_index
from tests.build_cases import (
    TOOL,
    files_of,
    load_tool,
    many,
    problems,
    run,
)


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


def command(source: Path, out: Path, workers: int) -> list[str]:
    options = ["--format", "jsonl", "--max-shard-mb", "0.04", "--workers", str(workers)]
    return [sys.executable, str(TOOL), "--input", str(source), "--out", str(out), *options]


def test_killed_and_run_again_gives_the_same_bytes(tool: ModuleType, tmp_path: Path) -> None:
    """SIGKILL after some shards, at another number of workers each time; then the whole must be as without."""
    source = many(tmp_path / "in", 1200)
    with (source / "data.jsonl").open("a") as file:  # repetitions of samples in shards that are long finished
        file.write(json.dumps({"problem": "Frage 0?", "answer": "0"}) + "\n{broken\n")
    out, untouched = tmp_path / "out", tmp_path / "untouched"
    work = out / ".train.build"
    done: list[int] = []
    for workers in (2, 0):
        process = subprocess.Popen(command(source, out, workers), start_new_session=True, stdout=subprocess.DEVNULL)
        before = len(list(work.glob("[0-9]*.json")))
        while len(list(work.glob("[0-9]*.json"))) < before + 4:
            assert process.poll() is None, "it was too quick to be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done.append(len(list(work.glob("[0-9]*.json"))))
        assert not list(out.glob("*.tar"))  # nothing half built can be taken for a data set
        deadline = time.monotonic() + 20  # workers of a killed parent end by themselves
        while _session_is_alive(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("*.tar") if int(path.stem[-5:]) < done[-1]}
    subprocess.run(command(source, out, 2), check=True, stdout=subprocess.DEVNULL)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished  # not written again
    run(tool, "--input", source, "--format", "jsonl", "--out", untouched, "--max-shard-mb", 0.04)
    assert files_of(out) == files_of(untouched)
    assert done[0] < done[1] < len(list(out.glob("*.tar")))
    assert [problem["kind"] for problem in problems(out)] == ["duplicate", "unreadable_sample"]


def _session_is_alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def _publish_one(journal: Journal, records: list[JournalEntry]) -> None:
    for path in (journal.folder / records[0].shard, index_path(journal.folder / records[0].shard)):
        path.rename(journal.folder.parent / path.name)
    raise KeyboardInterrupt


def test_what_a_second_run_does(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = many(tmp_path / "in", 40), tmp_path / "out"
    call = ("--input", source, "--format", "jsonl", "--out", out)
    run(tool, *call)
    before = files_of(out)
    run(tool, *call)
    assert "nothing to do" in capsys.readouterr().out and files_of(out) == before
    with pytest.raises(SystemExit):
        run(tool, *call, "--max-shard-mb", 1)
    assert "shards train-*.tar of another build" in capsys.readouterr().err
    # as if killed while the first shards are being published
    monkeypatch.setattr(Journal, "publish", _publish_one)
    small = (*call, "--name", "other", "--max-shard-mb", 0.01)
    with pytest.raises(KeyboardInterrupt):
        run(tool, *small)
    assert (out / "other-00000.tar").is_file() and not (out / "other.report.json").exists()
    monkeypatch.undo()
    run(tool, *small)
    run(tool, *small, "--out", tmp_path / "at once")
    assert {name: sha for name, sha in files_of(out).items() if "other" in name} == files_of(tmp_path / "at once")
    run(tool, *call, "--name", "more")
    assert files_of(out).items() >= before.items() and (out / "more-00000.tar").is_file()
    (out / ".third.build").mkdir()
    for name in ("plan.json", "00000.json"):
        (out / ".third.build" / name).write_text("{}")
    with pytest.raises(SystemExit):
        run(tool, *call, "--name", "third")
    assert "unfinished build of another input" in capsys.readouterr().err


def test_wrong_arguments(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ((), "--input and --format are needed"),
        (("--input", tmp_path, "--format", "jsonl"), "no file that ends with .jsonl"),
        (("--input", tmp_path, "--format", "jsonl", "--name", "a/b"), "letters, digits"),
        (("--input", tmp_path, "--format", "jsonl", "--max-shard-mb", 0), "above 0"),
        (("--input", tmp_path, "--format", "jsonl", "--rename", "x"), "COLUMN=FIELD"),
        (("--input", tmp_path, "--format", "webdataset", "--images", "x"), "--images belongs to"),
        (("--check",), "holds no *.tar"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(tool, "--out", tmp_path / "out", *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------- --check
@pytest.fixture(scope="module")
def built(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    run(tool, "--input", many(folder / "in", 12), "--format", "jsonl", "--out", folder / "out", "--max-shard-mb", 0.02)
    return folder / "out"


def check(tool: ModuleType, out: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    capsys.readouterr()
    try:
        run(tool, "--check", "--out", out)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_check_finds_every_flipped_byte(tool: ModuleType, built: Path, capsys: pytest.CaptureFixture) -> None:
    assert check(tool, built, capsys)[0] == 0
    shard = built / "train-00001.tar"
    whole, index = shard.read_bytes(), read_index(index_path(shard))
    sample = index.samples[0]
    places = np.random.default_rng(0).integers(0, len(whole), 40).tolist()
    for place in (0, 300, sample.offsets[0], sample.offsets[0] + 60, sample.offsets[-1] + 3, len(whole) - 1, *places):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        status, text = check(tool, built, capsys)
        assert status == 1 and "train-00001.tar" in text, place
        if place == sample.offsets[0] + 60:
            assert f"sample {sample.key!r}: its checksum is not that of the index" in text
    shard.write_bytes(whole)
    written = index_path(shard).read_bytes()
    columns = written.index(b"\n") + 1
    for place in np.random.default_rng(1).integers(columns, len(written) - 1, 10).tolist():
        index_path(shard).write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        assert check(tool, built, capsys)[0] == 1, place
    index_path(shard).write_bytes(written)
    assert check(tool, built, capsys)[0] == 0


def test_check_finds_what_is_missing(tool: ModuleType, built: Path, capsys: pytest.CaptureFixture) -> None:
    shard = built / "train-00001.tar"
    index = index_path(shard)
    for path, message in ((shard, "the shard is missing"), (index, "the index cannot be read")):
        whole = path.read_bytes()
        path.unlink()
        status, text = check(tool, built, capsys)
        assert status == 1 and message in text
        path.write_bytes(whole)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    status, text = check(tool, built, capsys)
    assert status == 1 and "train-00001.tar" in text
    shard.write_bytes(whole)
    known = read_index(index)
    wrong = replace(known.samples[0], image_sizes=((1, 1),))
    write_index(shard, replace(known, samples=(wrong, *known.samples[1:])))
    assert "image sizes are not those of the index" in check(tool, built, capsys)[1]
    write_index(shard, replace(known, samples=known.samples[1:]))
    assert f"sample {wrong.key!r}: it is not in the index" in check(tool, built, capsys)[1]
