"""Small files that ask for much memory or time: each is refused by what its header says, before anything is read."""

from __future__ import annotations

import json
import struct
import tarfile
import time
import zlib
from pathlib import Path

import pytest

from megatron_sr1.data import Quarantine, ShardDataset
from megatron_sr1.data.build.samples import BuiltSample, build_sample
from megatron_sr1.data.json_values import load_json
from megatron_sr1.data.pictures import MAX_PIXELS, SHARD_FORMATS, decode_picture, picture_size
from megatron_sr1.data.scan import scan_shard
from megatron_sr1.data.schema import MAX_IMAGE_BYTES, MAX_JSON_BYTES, decode_sample
from megatron_sr1.data.sources.source import RawSample
from tests.data_cases import QUESTION, write_tar


class _Rules:
    max_prompt_tokens = None

    def prompt_tokens(self, question: object) -> None:
        return None

    def boxed_answer(self, template: object, response: str) -> None:
        return None


def _png(width: int, height: int) -> bytes:
    """No pixel of it is there: whoever decoded it would fail with other words."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_picture_of_too_many_pixels_is_never_decoded() -> None:
    assert picture_size(_png(8192, 8192), SHARD_FORMATS) == (8192, 8192) and MAX_PIXELS == 8192**2
    for read in (decode_picture, picture_size):
        with pytest.raises(ValueError, match=rf"13000 x 13000 pixels, more than {MAX_PIXELS}: make it smaller"):
            read(_png(13000, 13000), SHARD_FORMATS)
    sample = RawSample("rows.jsonl, line 1", "k", dict(QUESTION), (_png(13000, 13000),))
    built = build_sample(sample, _Rules())
    assert not isinstance(built, BuiltSample) and built.kind == "unreadable_image" and "13000" in built.reason


def _sparse_tar(path: Path, sizes: dict[str, int]) -> Path:
    """Members of so many bytes, none of which the disk has to hold."""
    with path.open("wb") as file:
        for name, size in sizes.items():
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf())
            file.seek(-(-size // 512) * 512, 1)
        file.write(bytes(1024))
    return path


def test_members_too_large_to_be_read_whole_are_left_out_by_name(tmp_path: Path) -> None:
    names = {"a.json": MAX_JSON_BYTES + 1, "b.json": 10, "b.0.png": MAX_IMAGE_BYTES + 1, "c.json": MAX_JSON_BYTES}
    index, bad = scan_shard(_sparse_tar(tmp_path / "x.tar", names))
    assert [sample.key for sample in index.samples] == ["c"]
    reasons = {sample.key: sample.reason for sample in bad}
    assert "its member .json has 16 MiB, more than 16. Make it smaller" in reasons["a"]
    assert "its member .0.png has 256 MiB, more than 256" in reasons["b"]
    text = json.dumps({**QUESTION, "metadata": {"x": " " * MAX_JSON_BYTES}}).encode()
    with pytest.raises(ValueError, match=r"where: its member \.json has 16 MiB"):
        decode_sample("k", text, (), "where")


def test_many_members_of_a_key_and_of_an_object_take_no_square_of_time(tmp_path: Path) -> None:
    """At 20,000 the square took seconds, at a million for ever."""
    start = time.process_time()
    tar = _sparse_tar(tmp_path / "x.tar", {**{f"a.{n}.png": 1 for n in range(20_000)}, "b.json": 10})
    _, bad = scan_shard(tar)
    assert [sample.key for sample in bad] == ["a"] and "it has over 4096 members" in bad[0].reason
    long = write_tar(tmp_path / "long.tar", {"x." + "a." * 3000 + "json": QUESTION, "y.json": QUESTION})
    quarantine = Quarantine(1)
    assert len(ShardDataset([long], quarantine=quarantine)) == 1
    assert "its name has 6006 characters" in quarantine.bad[0].reason
    names = ",".join(f'"{n}": 1' for n in [*range(50_000), 49_999])
    with pytest.raises(ValueError, match="two values of '49999'"):
        load_json("{" + names + "}")
    assert time.process_time() - start < 10
