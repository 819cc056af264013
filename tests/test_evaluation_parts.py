"""What engines have written of an evaluation that is not finished, and the file of records that it becomes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.evaluation import Record, read_records, replace_lines
from megatron_sr1.evaluation.files import EvaluationFiles
from megatron_sr1.evaluation.parts import PartWriter, RecordParts
from megatron_sr1.loops.answering import _finish

from .evaluation_cases import MADE_OF, append_records, pair, record


def _records(count: int) -> list[Record]:
    return [record(f"größer\u2028{n}", [pair(str(n), "I see.", str(n))], gold=str(n)) for n in range(count)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 4), st.randoms())
def test_parts_become_the_records_in_order(
    tmp_path_factory: pytest.TempPathFactory, writers: list[int], chunk: int, random: object
) -> None:
    """Whoever wrote them, in whatever order; every chunk's last one is marked."""
    folder = tmp_path_factory.mktemp("parts")
    records = [replace(one, ends_chunk=False) for one in _records(len(writers))]
    order = list(range(len(writers)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for index in order:
        with PartWriter(folder / "parts", f"{writers[index]:05d}") as writer:
            writer.add(3 * index, records[index])
    parts = RecordParts(folder / "parts")
    assert parts.indices(MADE_OF) == [3 * index for index in range(len(writers))]
    lines = parts.merged(chunk)
    replace_lines(folder / "eval.jsonl", lines)
    last = len(records)
    wanted = [replace(one, ends_chunk=n % chunk == 0 or n == last) for n, one in enumerate(records, start=1)]
    assert list(read_records(folder / "eval.jsonl")) == wanted and len(lines) == last
    parts.remove()
    assert not (folder / "parts").exists() and parts.indices(MADE_OF) == []


def test_every_cut_leaves_the_whole_lines(tmp_path: Path) -> None:
    """The file is cut at every byte, as a kill might; the next line begins where the last whole one ends."""
    folder, records = tmp_path / "parts", _records(3)
    path, ends = folder / "00000.jsonl", [0]
    for index, one in enumerate(records):
        with PartWriter(folder, "00000") as writer:
            writer.add(index, one)
        ends.append(path.stat().st_size)
    content = path.read_bytes()
    for size in [*range(0, len(content), 11), *ends, *(end - 1 for end in ends[1:])]:
        path.write_bytes(content[:size])
        kept = sum(size >= end for end in ends) - 1
        assert RecordParts(folder).indices(MADE_OF) == list(range(kept))
        with PartWriter(folder, "00000") as writer:
            writer.add(7, records[0])
        assert RecordParts(folder).indices(MADE_OF) == [*range(kept), 7]
        assert path.read_bytes().startswith(content[: ends[kept]])


def test_a_sample_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    first, second, _ = _records(3)
    for name in ("00000", "records"):
        with PartWriter(tmp_path / "parts", name) as writer:
            writer.add(0, first)
            writer.add(1, second)
    assert len(RecordParts(tmp_path / "parts").merged(5)) == 2


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"index": 1}', b"\xff", b"null", b'{"index": 1, "record": {}}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    with PartWriter(tmp_path, "00001") as writer:
        writer.add(0, _records(1)[0])
    with (tmp_path / "00001.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"00001\.jsonl:2 is not a record .*--restart"):
        RecordParts(tmp_path).indices(MADE_OF)


def test_records_of_another_evaluation_are_not_continued(tmp_path: Path) -> None:
    with PartWriter(tmp_path, "00000") as writer:
        writer.add(0, replace(_records(1)[0], made_of="fedcba9876543210"))
    with pytest.raises(ValueError, match=r"is of another evaluation, fedc.*--restart"):
        RecordParts(tmp_path).indices(MADE_OF)


def _files(folder: Path, in_parts: int, recorded: int) -> EvaluationFiles:
    files, records = EvaluationFiles(folder, "evaluate"), _records(4)
    with PartWriter(files.parts, "00000") as writer:
        for index in range(in_parts):
            writer.add(index, records[index])
    if recorded:
        append_records(files.records, records[:recorded])
    return files


def test_parts_that_a_kill_has_left_behind_take_nothing_from_the_records(tmp_path: Path) -> None:
    """It came while they were removed, so those that are left are some of them."""
    files = _files(tmp_path, in_parts=2, recorded=4)
    before = files.records.read_bytes()
    assert not _finish(files, RecordParts(files.parts), 2, count=4, num_recorded=4)
    assert files.records.read_bytes() == before and not files.parts.exists()


def test_parts_are_removed_at_once_for_whoever_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = _files(tmp_path, in_parts=3, recorded=0)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)  # as if a kill came
    RecordParts(files.parts).remove()
    assert RecordParts(files.parts).indices(MADE_OF) == []
    monkeypatch.undo()
    with PartWriter(files.parts, "00000") as writer:
        writer.add(0, _records(1)[0])
    RecordParts(files.parts).remove()
    assert not any(files.parts.parent.iterdir())


def test_records_that_are_missing_are_told(tmp_path: Path) -> None:
    files = _files(tmp_path, in_parts=3, recorded=0)
    with pytest.raises(ValueError, match=r"holds 3 records of 4 that were answered\. Run the command again"):
        _finish(files, RecordParts(files.parts), 2, count=4, num_recorded=0)
    assert files.parts.exists() and not files.records.exists(), "what is there is not lost"
    assert _finish(files, RecordParts(files.parts), 2, count=3, num_recorded=0)
    assert len(list(read_records(files.records))) == 3 and not files.parts.exists()
