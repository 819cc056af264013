"""Indices beside shards: what they say is true, what they do not fit is named, and what they promise is checked."""

from __future__ import annotations

import hashlib
import json
import math
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sr1.data import Quarantine, SampleStream, ShardDataset, write_shards
from megatron_sr1.data.index import ShardIndex, index_path, parse_index, read_index, write_index
from megatron_sr1.data.scan import scan_shard
from megatron_sr1.types import Prompt, SftSample
from tests.data_cases import QUESTION, encoded, equal, noise, picture, png, prompts, write_tar


def indexed(shards: list[Path], tokens: dict[str, int] | None = None) -> list[Path]:
    """Writes the index of each shard, with the text tokens of some samples by key."""
    for shard in shards:
        index, bad = scan_shard(shard, contents=True)
        assert not bad
        samples = [vars(s) | {"text_tokens": (tokens or {}).get(s.key)} for s in index.samples]
        kind = type(index.samples[0])
        write_index(shard, ShardIndex(index.num_bytes, tuple(kind(**s) for s in samples), "test"))
    return shards


def mixed_samples() -> list[Prompt | SftSample]:
    images = (noise(0, (9, 7)), noise(1, (6, 30)))
    return [*prompts(5), Prompt("many", "q", "1", images), SftSample(Prompt("demo", "q", "1"), "see_think", "r")]


def test_an_index_says_what_is_in_the_shard(tmp_path: Path) -> None:
    """Compared with tarfile and Pillow, member by member."""
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "x/one.json": QUESTION,
            "x/one.1.jpg": encoded(noise(3, (31, 17)), "JPEG"),
            "x/one.0.PNG": encoded(noise(4, (8, 5))),
            "two.json": QUESTION,
        },
    )
    index = read_index(index_path(indexed([shard])[0]))
    first, second = index.samples
    assert (first.key, second.key, second.image_sizes) == ("x/one", "two", ())
    assert first.image_sizes == ((8, 5), (31, 17)), "in the order of the numbers, not of the members"
    data = shard.read_bytes()
    assert index.num_bytes == len(data)
    with tarfile.open(shard) as archive:
        for sample in index.samples:
            for extension, offset, size in zip(sample.extensions, sample.offsets, sample.sizes, strict=True):
                file = archive.extractfile(f"{sample.key}.{extension}")
                assert file is not None and data[offset : offset + size] == file.read()
    json_bytes = json.dumps(QUESTION).encode()
    assert second.checksum == hashlib.sha256(f"json\0{len(json_bytes)}\0".encode() + json_bytes).hexdigest()


def test_a_dataset_is_the_same_with_an_index(tmp_path: Path) -> None:
    shards = write_shards(mixed_samples(), tmp_path, "t", 3)
    scanned = ShardDataset(shards)
    dataset = ShardDataset(indexed(shards))
    assert len(dataset) == len(scanned) == 7
    assert all(equal(dataset.read(i), scanned.read(i)) for i in range(7))
    assert [dataset.image_sizes(i) for i in range(7)] == [scanned.image_sizes(i) for i in range(7)]
    assert dataset.image_sizes(5) == ((9, 7), (6, 30))
    assert SampleStream(dataset, 3).indices(0, 50) == SampleStream(scanned, 3).indices(0, 50)


def test_planning_opens_no_shard(tmp_path: Path) -> None:
    """Zeros in place of the shards: order and sizes are known, and reading notices."""
    shards = indexed(write_shards(mixed_samples(), tmp_path, "t", 3))
    whole = SampleStream(ShardDataset(shards), 1).sizes(0, 7)
    for shard in shards:
        shard.write_bytes(bytes(shard.stat().st_size))
    stream = SampleStream(ShardDataset(shards), 1)
    assert stream.sizes(0, 7) == whole
    assert {size.key: size.image_sizes for size in whole}["many"] == ((9, 7), (6, 30))
    with pytest.raises(ValueError, match=r"t-0000\d\.tar, sample '.*': its bytes are not those that the index"):
        stream.take(0, 1)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Also those that a JPEG decoder does not see."""
    samples = [Prompt(f"s{i}", "q", "1") for i in range(2)]
    shard = write_shards(samples, tmp_path, "t", 2)[0]
    shard = write_tar(shard, {"k.json": QUESTION, "k.0.jpg": encoded(noise(0, (40, 40)), "JPEG")})
    dataset, data = ShardDataset(indexed([shard])), bytearray(shard.read_bytes())
    sample, draw = dataset.describe(0), random.Random(0)
    for offset, size in zip(sample.offsets, sample.sizes, strict=True):
        for place in draw.sample(range(offset, offset + size), 20):
            shard.write_bytes(data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :])
            with pytest.raises(ValueError, match="its bytes are not those"):
                dataset.read(0)
    shard.write_bytes(data)
    assert dataset.read(0).key == "k"


def test_an_index_of_another_shard_is_refused(tmp_path: Path) -> None:
    small, large = (indexed(write_shards(prompts(n), tmp_path / str(n), "t", 99))[0] for n in (3, 30))
    large_index, small_index = index_path(large).read_bytes(), index_path(small).read_bytes()
    index_path(large).write_bytes(small_index)
    with pytest.raises(ValueError, match=r"t-00000\.tar has \d+ bytes, and its index speaks of \d+: .* Build it again"):
        ShardDataset([large])
    index_path(large).write_bytes(large_index)
    large.unlink()
    with pytest.raises(ValueError, match=r"t-00000\.tar: the shard is missing .*but its index is there"):
        ShardDataset([large])


def test_rewriting_a_shard_removes_its_index(tmp_path: Path) -> None:
    indexed(write_shards(prompts(4), tmp_path, "t", 1))
    indexed(write_shards(prompts(4), tmp_path, "other", 2))
    shards = write_shards(prompts(2), tmp_path, "t", 1)
    assert [index_path(shard).exists() for shard in shards] == [False, False]
    assert len(list(tmp_path.glob("*.index.json"))) == 2, "those of the other shards"


def test_a_truncated_shard_costs_what_is_cut(tmp_path: Path) -> None:
    shard = indexed(write_shards(prompts(6), tmp_path, "t", 9))[0]
    end = max(ShardDataset([shard]).describe(3).offsets)
    shard.write_bytes(shard.read_bytes()[: end + 10])
    with pytest.raises(ValueError, match=r"t-00000\.tar, sample 'p003': the shard is truncated to"):
        ShardDataset([shard])
    quarantine = Quarantine(3)
    dataset = ShardDataset([shard], quarantine=quarantine)
    assert [bad.key for bad in quarantine.bad] == ["p003", "p004", "p005"]
    assert [dataset.read(i).key for i in range(3)] == ["p000", "p001", "p002"]
    with pytest.raises(ValueError, match=r"data\.max_bad_samples=2 is exceeded(.|\n)*'p003'(.|\n)*'p004'(.|\n)*'p005'"):
        ShardDataset([shard], quarantine=Quarantine(2))


# ---------------------------------------------------------------- without an index: damage within the budget
def test_a_scan_leaves_out_what_breaks_the_schema(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "a.json": QUESTION,
            "gap.json": QUESTION,
            "gap.1.png": png(1),
            "b.json": QUESTION,
            "../out.json": QUESTION,
            "twice.json": QUESTION,
            "c.json": QUESTION,
            "./twice.json": QUESTION,
            "strange.json": QUESTION,
            "strange.txt": b"",
            "d.json": QUESTION,
        },
    )
    quarantine = Quarantine(9, tmp_path / "quarantine" / "train.jsonl")
    dataset = ShardDataset([shard], quarantine=quarantine)
    assert [dataset.read(i).key for i in range(len(dataset))] == ["a", "b", "c", "d"]
    entries = [json.loads(line) for line in (tmp_path / "quarantine" / "train.jsonl").read_text().splitlines()]
    assert [(entry["shard"], entry["key"]) for entry in entries] == [
        ("a.tar", key) for key in ("gap", "../out", "twice", "strange")
    ]
    assert all("a.tar" in entry["reason"] for entry in entries)


def test_a_shard_cut_short_without_an_index_keeps_its_beginning(tmp_path: Path) -> None:
    shard = write_shards(prompts(6), tmp_path, "t", 9)[0]
    offset = ShardDataset([shard]).describe(3).offsets[1]
    shard.write_bytes(shard.read_bytes()[:offset])
    quarantine = Quarantine(1)
    dataset = ShardDataset([shard], quarantine=quarantine)
    assert [dataset.read(i).key for i in range(len(dataset))] == ["p000", "p001", "p002"]
    assert [bad.key for bad in quarantine.bad] == ["p003"]


# ---------------------------------------------------------------- lengths
def test_the_length_filter_reads_only_indices(tmp_path: Path) -> None:
    samples = [Prompt(f"p{i}", "q", "1", (picture(i, width=10 * (i + 1)),) * (i % 3)) for i in range(9)]
    tokens = {sample.key: 10 + i for i, sample in enumerate(samples)}
    shards = indexed(write_shards(samples, tmp_path, "t", 4), tokens)
    for shard in shards:
        shard.write_bytes(bytes(shard.stat().st_size))

    def visual(size: tuple[int, int]) -> int:
        return size[0] // 10

    want = {s.key: tokens[s.key] + sum(image.width // 10 - 1 for image in s.images) for s in samples}
    dataset = ShardDataset(shards)
    found = {size.key: size.prompt_tokens(visual) for size in SampleStream(dataset, 0).sizes(0, 9)}
    assert found == want
    for limit in sorted(want.values()):
        stream = SampleStream(dataset, 0, max_prompt_tokens=limit, visual_tokens=visual)
        keys = {size.key for size in stream.sizes(0, stream.num_samples)}
        assert keys == {key for key, length in want.items() if length <= limit}
        assert stream.num_left_out == 9 - len(keys)
        same = SampleStream(dataset, 0, max_prompt_tokens=limit, needs_lengths=False, visual_tokens=visual)
        assert same.fingerprint == stream.fingerprint, "an index with lengths is asked in either case"
    assert SampleStream(dataset, 0).fingerprint != stream.fingerprint or len(keys) == 9
    with pytest.raises(ValueError, match=r"longer than 9 tokens"):
        SampleStream(dataset, 0, max_prompt_tokens=9, visual_tokens=visual)


def test_the_length_filter_says_what_it_needs(tmp_path: Path) -> None:
    dataset = ShardDataset(indexed(write_shards(prompts(2), tmp_path, "t", 4)))
    with pytest.raises(ValueError, match=r"sample 'p000': data\.max_prompt_tokens=9 needs prompt lengths.*--model"):
        SampleStream(dataset, 0, max_prompt_tokens=9, visual_tokens=lambda size: 1)
    whole = SampleStream(dataset, 0, max_prompt_tokens=9, needs_lengths=False, visual_tokens=lambda size: 1)
    assert (whole.num_samples, whole.num_left_out) == (len(dataset), 0)


def test_lengths_are_those_of_the_processor(tmp_path: Path, tiny_model_dir: str) -> None:
    from megatron_sr1.processor import Processor

    processor = Processor.from_pretrained(tiny_model_dir)
    samples = [Prompt(f"p{i}", "q" * i, "1", (noise(i, (40 + 30 * i, 90)),) * (i % 3)) for i in range(1, 6)]
    unexpanded = {s.key: processor.prompt_ids(s.problem, len(s.images)) for s in samples}
    shards = indexed(write_shards(samples, tmp_path, "t", 9), {key: len(ids) for key, ids in unexpanded.items()})
    sizes = SampleStream(ShardDataset(shards), 0).sizes(0, 5)
    for sample in samples:
        grids = [processor.encode_image(image).grid_thw for image in sample.images]
        known = next(size for size in sizes if size.key == sample.key)
        real = processor.expand(unexpanded[sample.key], grids)
        assert known.prompt_tokens(lambda size: math.prod(processor.grid(size)) // processor.merge_size**2) == len(real)


# ---------------------------------------------------------------- damaged index files
def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    shard = indexed(write_shards(prompts(2), tmp_path, "t", 4))[0]
    first, second = index_path(shard).read_text().splitlines()
    good = json.loads(first)
    empty = {"sha256": hashlib.sha256(b"{}").hexdigest()}
    heads = [json.dumps(good | damage) for damage in ({"version": 2}, {"fingerprint": "0"}, {"num_bytes": 700})]
    whole = [f"{head}\n{second}" for head in heads]
    for text in [*whole, f"{json.dumps(good | empty)}\n{{}}", first, "", "[]\n[]", f"{first}\n{second}\n{second}"]:
        index_path(shard).write_text(text)
        with pytest.raises(ValueError, match=r"t-00000\.tar\.index\.json: the index is damaged or of another kind"):
            ShardDataset([shard])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mutated_index_is_noticed_or_harmless(data: st.DataObject) -> None:
    good = MUTABLE
    place = data.draw(st.integers(0, len(good) - 1))
    kind = data.draw(st.sampled_from(["replace", "cut", "insert"]))
    byte = bytes([data.draw(st.integers(0, 255))])
    bad = (
        good[:place] + {"replace": byte, "cut": b"", "insert": byte + good[place : place + 1]}[kind] + good[place + 1 :]
    )
    try:
        found = parse_index(bad, "here")
    except ValueError as error:
        assert str(error).startswith("here: the index is damaged")
        return
    assert found.samples == parse_index(good, "here").samples


def _mutable() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shard = indexed(write_shards(prompts(2), Path(folder), "t", 4))[0]
        return index_path(shard).read_bytes()


MUTABLE = _mutable()
