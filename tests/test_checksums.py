"""Checksums of checkpoints: against zlib over whole files, shared by ranks, and what is wrong named."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from megatron_sr1.ranks import ALONE
from megatron_sr1.training.checksums import FILE, check_checksums, checksums_of, read_checksums, write_checksums
from tests.thread_ranks import on_threads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in {"a.distcp": 9_000_001, "b.distcp": 10, "empty": 0, ".metadata": 3}.items():
        (tmp_path / name).write_bytes(bytes(i % 251 for i in range(size)))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"weights")
    write_checksums(tmp_path, checksums_of([tmp_path / "a.distcp"]))
    return tmp_path


def test_they_are_those_of_zlib_over_all_files_of_the_folder_itself(folder: Path) -> None:
    found = read_checksums(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != FILE}
    assert found == {name: (len(content), zlib.crc32(content)) for name, content in files.items()}
    assert check_checksums(folder, ALONE) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ranks_share_the_files_and_all_hear_what_is_wrong(folder: Path, number: int) -> None:
    content = bytearray((folder / "a.distcp").read_bytes())
    content[7_000_000] ^= 1
    (folder / "a.distcp").write_bytes(content)
    (folder / "b.distcp").write_bytes(b"short")
    (folder / ".metadata").unlink()
    heard = on_threads(number, lambda ranks: check_checksums(folder, ranks))
    assert all(sorted(one) == sorted(heard[0]) for one in heard) and len(heard[0]) == 3
    text = "\n".join(heard[0])
    assert (
        "a.distcp is not what was written: CRC-32 " in text and "b.distcp is not what was written: 5 bytes in" in text
    )
    assert ".metadata cannot be read (No such file or directory)" in text


def test_a_folder_of_an_earlier_release_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.distcp").write_bytes(b"x")
    assert read_checksums(tmp_path) == {} and check_checksums(tmp_path, ALONE) == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": [1, "x"]}', '{"../a": [1, 2]}', "[" * 100_000])
def test_damaged_checksums_are_named(folder: Path, text: str) -> None:
    (folder / FILE).write_text(text)
    (wrong,) = check_checksums(folder, ALONE)
    assert f"{folder / FILE} is damaged" in wrong


def test_what_is_deleted_beneath_is_no_fault(folder: Path) -> None:
    (folder / "hf" / "model.safetensors").unlink()
    assert check_checksums(folder, ALONE) == []
    assert json.loads((folder / FILE).read_text()).keys() == {"a.distcp", "b.distcp", "empty", ".metadata"}
