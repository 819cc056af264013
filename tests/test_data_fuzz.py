"""Mutated tars, jsons and images: never a crash, and with an index never a wrong sample."""

from __future__ import annotations

import io
import json
import random
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from megatron_sr1.data import Quarantine, SampleFeed, SampleStream, ShardDataset, write_shards
from megatron_sr1.data.scan import scan_shard
from megatron_sr1.data.schema import decode_sample, image_size
from megatron_sr1.types import Prompt
from tests.data_cases import QUESTION, encoded, equal, noise, write_tar
from tests.test_data_index import indexed

TEXT = json.dumps(QUESTION | {"choices": ["1", "3"], "metadata": {"n": [1, 2.5, None]}}).encode()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Bytes replaced, bits flipped, runs cut out and put in."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        place = draw.randrange(len(out) or 1)
        match draw.randrange(4):
            case 0 if out:
                out[place] = draw.randrange(256)
            case 1 if out:
                out[place] ^= 1 << draw.randrange(8)
            case 2:
                del out[place : place + draw.randrange(1, 30)]
            case _:
                out[place:place] = draw.randbytes(draw.randrange(1, 10))
    return bytes(out)


def images() -> list[bytes]:
    image = noise(0, (20, 24))
    kinds = [encoded(image, kind) for kind in ("PNG", "JPEG", "WEBP")]
    kinds += [encoded(image.convert("P")), encoded(image.convert("RGBA")), encoded(image.convert("1"))]
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", progressive=True, exif=Image.Exif())
    return [*kinds, buffer.getvalue()]


@pytest.mark.filterwarnings("ignore")  # Pillow's, about odd files
def test_mutated_images_and_jsons_are_read_or_refused() -> None:
    draw, refused, kinds = random.Random(0), 0, images()
    for _ in range(1500):
        image, text = mutated(draw.choice(kinds), draw), mutated(TEXT, draw)
        calls: list[Callable[[], object]] = [
            lambda image=image: decode_sample("k", TEXT, [image], "here"),
            lambda text=text: decode_sample("k", text, [], "here"),
            lambda image=image: image_size(image, "here"),
        ]
        for call in calls:
            try:
                call()
            except ValueError as error:
                assert str(error).startswith("here")
                refused += 1
    assert 1000 < refused < 4000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes, dict[str, Prompt]]:
    """A shard, its index, its samples by key."""
    folder = tmp_path_factory.mktemp("whole")
    samples = [Prompt(f"k{i}", f"q{i}", str(i), (noise(i, (9, 9)),)) for i in range(5)] + [Prompt("k" * 120, "q", "1")]
    shard = indexed(write_shards(samples, folder, "t", 9))[0]
    index = shard.with_name(shard.name + ".index.json").read_bytes()
    data = shard.read_bytes()
    return data[: len(data.rstrip(b"\0")) + 1024], index, {sample.key: sample for sample in samples}


def _drain(shard: Path, budget: int) -> list[Prompt]:
    """One epoch of what is good."""
    quarantine = Quarantine(budget)
    dataset = ShardDataset([shard], quarantine=quarantine)
    with SampleFeed(SampleStream(dataset, 0), quarantine) as feed:
        while True:
            batch = feed.next(len(dataset))
            if max(batch.positions) >= len(dataset):  # bad ones were found: the epoch without them
                return [s for s, p in zip(batch.samples, batch.positions, strict=True) if p < len(dataset)]
            return list(batch.samples)


def test_a_mutated_shard_with_its_index_gives_right_samples_only(
    tmp_path: Path, whole: tuple[bytes, bytes, dict[str, Prompt]]
) -> None:
    data, index, samples = whole
    draw, shard, outcomes = random.Random(1), tmp_path / "m.tar", {"right": 0, "refused": 0}
    shard.with_name("m.tar.index.json").write_bytes(index)
    for _ in range(150):
        changed = mutated(data, draw)
        shard.write_bytes(changed[: len(data)])  # a longer one is refused at the start
        try:
            found = _drain(shard, budget=9)
        except ValueError as error:
            assert "no sample of the training data" in str(error)
            outcomes["refused"] += 1
            continue
        assert all(equal(sample, samples[sample.key]) for sample in found)
        assert len({sample.key for sample in found}) == len(found)
        outcomes["right"] += len(found)
    assert outcomes["right"] > 150 and outcomes["refused"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_mutated_shard_without_an_index_never_crashes(
    tmp_path: Path, whole: tuple[bytes, bytes, dict[str, Prompt]]
) -> None:
    """Keys and images stay together: no sample has another's image, however the members are torn."""
    data, _, samples = whole
    draw, shard = random.Random(2), tmp_path / "m.tar"
    for _ in range(100):
        shard.write_bytes(mutated(data, draw))
        index, bad = scan_shard(shard, contents=draw.random() < 0.5)
        assert len(index.samples) < len(samples) or not bad
        try:
            found = _drain(shard, budget=9)
        except ValueError:
            continue
        for sample in found:
            assert sample.key not in samples or len(sample.images) == len(samples[sample.key].images)


def _header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with a right checksum, whatever it says."""
    block = bytearray(512)
    block[: len(name)], block[100:108], block[124:136] = name, b"0000644\0", size
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _base_256(number: int) -> bytes:
    return (b"\xff" if number < 0 else b"\x80") + (number % (1 << 88)).to_bytes(11, "big")


@pytest.mark.parametrize("number", [1 << 80, 1 << 62, 1 << 40, -1, -512, -1024])
def test_hostile_sizes_end_the_shard(tmp_path: Path, number: int) -> None:
    """Negative ones send tarfile back to headers it has read: round in a circle."""
    good = _header(b"k.json", b"%011o\0" % len(TEXT)) + TEXT.ljust(512, b"\0")
    shard = tmp_path / "h.tar"
    shard.write_bytes(good + _header(b"a.json", _base_256(number)) + bytes(1024))
    index, bad = scan_shard(shard)
    assert len(bad) == 1 and "h.tar: cannot be read as an uncompressed tar" in bad[0].reason
    assert {sample.key for sample in index.samples} <= {"k"}


@pytest.mark.parametrize("records", [b"30 GNU.sparse.size=zzzzzzzzz\n\n", b"22 GNU.sparse.map=1,x\n", b"99999 a=b\n"])
def test_hostile_extended_headers_end_the_shard(tmp_path: Path, records: bytes) -> None:
    good = _header(b"k.json", b"%011o\0" % len(TEXT)) + TEXT.ljust(512, b"\0")
    extended = _header(b"x", b"%011o\0" % len(records), b"x") + records.ljust(512, b"\0")
    shard = tmp_path / "h.tar"
    for copies in (1, 3000):  # tarfile takes one call in another for each
        shard.write_bytes(extended * copies + good + bytes(1024))
        index, bad = scan_shard(shard)
        assert len(index.samples) + len(bad) == 1


def test_the_plain_library_reads_what_is_left(tmp_path: Path) -> None:
    """A shard with bad samples: those that we give are those that a plain pipeline gives, but for the bad ones."""
    import webdataset

    members: dict[str, bytes | dict] = {}
    for i in range(6):
        members |= {f"s{i}.json": QUESTION | {"answer": str(i)}, f"s{i}.0.png": encoded(noise(i, (6, 4)))}
    members["s2.json"] = b"{"
    shard = write_tar(tmp_path / "a.tar", members)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = webdataset.WebDataset(str(shard), shardshuffle=False)
        plain = plain.decode("pilrgb", handler=webdataset.ignore_and_continue)
        theirs = {s["__key__"]: (s["json"]["answer"], s["0.png"].tobytes()) for s in plain}
    ours = {s.key: (s.answer, s.images[0].tobytes()) for s in _drain(shard, budget=1)}
    assert ours == theirs and len(ours) == 5
    with tarfile.open(shard) as archive:
        assert len(archive.getnames()) == 12
