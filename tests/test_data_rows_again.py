"""Shards of rows are built once, whoever builds them and however often he is killed, and again after a change."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sr1.config import DataConfig
from megatron_sr1.data import (
    Quarantine,
    SampleFeed,
    open_stream,
    prepare_data,
)
from megatron_sr1.data.build import cached
from megatron_sr1.data.build.journal import Journal
from tests.build_cases import many, picture
from tests.data_cases import encoded
from tests.row_cases import ROWS, built, config, opened, parquet, write_rows


# ---------------------------------------------------------------- once
def _prepare(data: DataConfig, start: Any, said: Any) -> None:
    start.wait()
    prepare_data(data, "train", said.put)


def test_two_processes_build_once(tmp_path: Path) -> None:
    data = config(tmp_path, many(tmp_path / "in", 200) / "data.jsonl")
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_prepare, args=(data, start, said)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    lines = []
    while not said.empty():
        lines.append(said.get())
    assert sum("building shards" in line for line in lines) == 1, lines
    before = {path: path.stat().st_mtime_ns for path in built(tmp_path)[0].iterdir()}
    assert len(opened(data)) == 200
    prepare_data(data, "train", lambda line: pytest.fail(line))
    assert {path: path.stat().st_mtime_ns for path in built(tmp_path)[0].iterdir()} == before


def _build_and_die(data: DataConfig, method: str, calls: int) -> None:
    """SIGKILL at the beginning of a call to the journal."""
    real, count = Journal.__dict__[method], iter(range(calls))

    def dying(*arguments: Any) -> Any:
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(Journal, method, dying)
    prepare_data(data, "train", str)


def test_killed_in_the_middle_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it builds, twice, before it publishes, before it cleans up; the whole is as if it had not been."""
    monkeypatch.setattr(cached, "MAX_SHARD_BYTES", 20_000)
    source = many(tmp_path / "in", 60) / "data.jsonl"
    data, context = config(tmp_path, source), multiprocessing.get_context("fork")
    for method, calls in (("add", 2), ("add", 1), ("publish", 0), ("remove", 0)):
        process = context.Process(target=_build_and_die, args=(data, method, calls))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (folder,) = built(tmp_path)
        assert (cached.whole_report(folder, "data") is not None) == (method == "remove")
    early = len([*(folder / ".data.build").glob("[0-9]*.json")])
    assert early > 3 and len(opened(data)) == 60
    untouched = DataConfig(train=(str(source),), cache_dir=str(tmp_path / "untouched"))
    assert opened(untouched).fingerprint == opened(data).fingerprint
    (other,) = (path for path in (tmp_path / "untouched" / "built").iterdir() if path.is_dir())
    tars = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    assert tars == {path.name: path.read_bytes() for path in other.glob("*.tar")} and len(tars) > 3


def test_a_changed_file_is_another_entry(tmp_path: Path) -> None:
    """And a run that began with the first is refused; a file that is only touched is the same data."""
    path = tmp_path / "a.jsonl"
    write_rows(path, ROWS)
    data = config(tmp_path, path)
    stream = open_stream(data, "train", 5, Quarantine(0), None)
    with SampleFeed(stream, Quarantine(0), workers=1) as feed:
        feed.next(2)
        state = feed.state()
    os.utime(path, (1, 1))
    with SampleFeed(open_stream(data, "train", 5, Quarantine(0), None), Quarantine(0), workers=1) as feed:
        feed.restore(state)
    write_rows(path, [*ROWS[:5], {"problem": "q5?", "answer": "6"}])
    with (
        SampleFeed(open_stream(data, "train", 5, Quarantine(0), None), Quarantine(0), workers=1) as feed,
        pytest.raises(ValueError, match=r"not those that the run began with: a-00000\.tar changed"),
    ):
        feed.restore(state)
    assert len(built(tmp_path)) == 3
    assert len(opened(config(tmp_path, path, train_columns={"answer": "answer"}))) == 6
    assert len(built(tmp_path)) == 4, "other columns, another entry"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_a_changed_image_is_another_entry(tmp_path: Path, kind: str) -> None:
    """Of every format that may name images by path; one that is restored is the first entry again."""
    image = tmp_path / "i" / "x.png"
    image.parent.mkdir()
    image.write_bytes(encoded(picture(1)))
    os.utime(image, (5, 5))
    rows, path = [{"problem": "Which?", "answer": "1", "image": "i/x.png"}], tmp_path / f"a.{kind}"
    if kind == "parquet":
        parquet(path, [{**rows[0], "image": {"bytes": None, "path": "i/x.png"}}])
    elif kind == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(json.dumps(rows if kind == "json" else rows[0]))
    data = config(tmp_path, path)
    first = opened(data)
    image.write_bytes(encoded(picture(2)))
    second = opened(data)
    assert second.fingerprint != first.fingerprint and len(built(tmp_path)) == 2
    assert second.read(0).images[0].tobytes() == picture(2).tobytes()
    image.write_bytes(encoded(picture(1)))
    os.utime(image, (5, 5))
    assert opened(data).fingerprint == first.fingerprint and len(built(tmp_path)) == 2


def test_what_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)

    def publish(journal: Journal, records: list[Any]) -> None:
        real(journal, records)
        write_rows(path, ROWS[:2])

    real = Journal.publish
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "publish", publish)
        with pytest.raises(ValueError, match="a file was changed while shards were built of it"):
            opened(config(tmp_path, path))
    assert built(tmp_path) == [] and len(opened(config(tmp_path, path))) == 2
