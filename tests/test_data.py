"""Shards: what is written is read, by us and by WebDataset; damage is named; the stream loses and repeats nothing."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_sr1.data import SampleStream, ShardDataset, expand_shards, write_shards
from megatron_sr1.data.sources.files import find_files
from megatron_sr1.types import Prompt, SftSample
from tests.data_cases import QUESTION, equal, picture, png, prompts, write_tar


# ---------------------------------------------------------------- writing and reading
def test_prompts_come_back_from_several_shards(tmp_path: Path) -> None:
    written = prompts(7)
    paths = write_shards(written, tmp_path, "train", samples_per_shard=3)
    assert [path.name for path in paths] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    dataset = ShardDataset(paths)
    assert len(dataset) == 7
    assert all(equal(dataset.read(i), written[i]) for i in (6, 0, 3, 2, 5, 1, 4))
    for i in (-1, 7):
        with pytest.raises(IndexError, match=f"sample {i} of 7"):
            dataset.read(i)


def test_demonstrations_choices_and_many_images_come_back(tmp_path: Path) -> None:
    twelve = tuple(picture(i, width=i + 1) for i in range(12))  # 10.png sorts before 2.png as text
    written = [
        SftSample(
            Prompt("a", "q\n(A) 1\n(B)", "A", twelve, metadata={"choices": ("1", "B"), "n": 2}), "see_think", "r"
        ),
        SftSample(Prompt("sub/b", "q", "1"), "caption_reasoner", "r", "a description"),
    ]
    dataset = ShardDataset(write_shards(written, tmp_path, "demo", samples_per_shard=10))
    assert all(equal(dataset.read(i), sample) for i, sample in enumerate(written))


def test_a_tar_made_by_tarfile_is_read(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("L", (6, 4), 90).save(jpeg, format="JPEG")
    long_key = "k" * 150  # needs a pax or GNU header of its own
    path = write_tar(
        tmp_path / "a.tar",
        {
            "./x/one.json": QUESTION | {"choices": ["3", "4"]},
            "./x/one.1.jpg": jpeg.getvalue(),
            "./x/one.0.png": png(7),
            ".hidden": b"",
            "README": b"no key",
            f"{long_key}.json": QUESTION,
        },
    )
    dataset = ShardDataset([path])
    sample = dataset.read(0)
    assert isinstance(sample, Prompt)
    assert (sample.key, sample.metadata["choices"]) == ("x/one", ("3", "4"))
    assert [image.mode for image in sample.images] == ["RGB", "RGB"]
    assert [image.getpixel((0, 0))[0] for image in sample.images] == [7, 90]
    assert len(dataset) == 2 and dataset.read(1).key == long_key


def test_a_tar_made_by_webdataset_is_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        writer.write({"__key__": "s", "json": QUESTION, "0.png": picture(9)})
    assert equal(ShardDataset([tmp_path / "w.tar"]).read(0), Prompt("s", "How many?", "3", (picture(9),)))


def test_our_shards_are_read_by_a_plain_webdataset_pipeline(tmp_path: Path) -> None:
    paths = write_shards(prompts(5), tmp_path, "train", samples_per_shard=2)
    pipeline = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode("pilrgb")
    samples = list(pipeline)
    assert [sample["__key__"] for sample in samples] == [f"p{i:03d}" for i in range(5)]
    assert [sample["json"]["answer"] for sample in samples] == ["0", "1", "2", "3", "4"]
    assert [sample["0.png"].getpixel((0, 0))[0] for sample in samples] == [0, 1, 2, 3, 4]


def test_bytes_depend_on_the_samples_only(tmp_path: Path) -> None:
    first, second = (write_shards(prompts(3), tmp_path / folder, "t", 3)[0] for folder in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_write_leaves_the_earlier_shards_and_no_rubbish(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in write_shards(prompts(4), tmp_path, "t", 2)}
    with pytest.raises(ValueError, match=r"'p000' names two samples"):
        write_shards([*prompts(3), *prompts(1)], tmp_path, "t", 1)
    with pytest.raises(ValueError, match="no samples to write"):
        write_shards([], tmp_path, "t", 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_shorter_write_replaces_all_shards_of_its_name_only(tmp_path: Path) -> None:
    write_shards(prompts(4), tmp_path, "t", 1)
    other = write_shards(prompts(2), tmp_path, "t-other", 1)
    paths = write_shards(prompts(2), tmp_path, "t", 1)
    assert sorted(tmp_path.iterdir()) == sorted(paths + other)


@pytest.mark.parametrize("key", ["", "a.b", "/a", "../a", "a//b", "a/./b"])
def test_a_key_that_cannot_name_a_member_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="cannot name a sample"):
        write_shards([Prompt(key, "q", "1")], tmp_path, "t", 1)


def test_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    def fingerprint(folder: str, name: str, samples: list[Prompt]) -> str:
        return ShardDataset(write_shards(samples, tmp_path / folder, name, 2)).fingerprint

    base = fingerprint("a", "t", prompts(3))
    assert fingerprint("b", "t", prompts(3)) == base and len(base) == 64
    others = {fingerprint("c", "u", prompts(3)), fingerprint("d", "t", prompts(4))}
    others.add(fingerprint("e", "t", [*prompts(2), Prompt("p002", "a longer question", "2", (picture(2),))]))
    assert len(others | {base}) == 4


# ---------------------------------------------------------------- damage is named
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.json": b"{", "k.0.png": png(1)}, r"a\.tar, sample 'k': .*not valid JSON"),
        ({"k.json": b"\xff\xfe"}, "not valid JSON"),
        ({"k.json": b"[" * 200_000}, "not valid JSON"),
        ({"k.json": QUESTION | {"problem": "\ud83d"}}, "must be a string of Unicode text"),
        ({"k.json": b"[1]"}, "holds a list"),
        ({"k.json": {"problem": "q"}}, r"a\.tar, sample 'k': the required field 'answer' is missing"),
        ({"k.json": {"problem": "q", "answer": 3}}, "answer=3 must be a string"),
        ({"k.json": {"problem": " ", "answer": "3"}}, "problem=' ' must be a string .*not empty"),
        ({"k.json": QUESTION | {"id": 4}}, "unknown field 'id'.*under metadata"),
        ({"k.json": QUESTION | {"metadata": []}}, "metadata=.*JSON object"),
        ({"k.json": QUESTION | {"source": 1}}, "source=1 must be a JSON string"),
        ({"k.json": QUESTION | {"choices": "AB"}}, "choices='AB' must be a list of strings"),
        ({"k.json": QUESTION | {"metadata": {"choices": []}}}, "must not hold 'choices'"),
        ({"k.json": QUESTION | {"response": "r"}}, "the required field 'template' is missing"),
        ({"k.json": QUESTION | {"description": "d"}}, "the required field 'template' is missing"),
        ({"k.json": QUESTION | {"response": "r", "template": " "}}, "template=' ' must be a string .*not empty"),
        (
            {
                "k.json": QUESTION | {"response": "r", "template": "caption_reasoner", "description": "d"},
                "k.0.png": png(1),
            },
            "1 images; it must have none",
        ),
        ({"k.json": QUESTION, "k.0.png": b"not a picture"}, r"sample 'k', image 0: cannot be decoded"),
        ({"k.json": QUESTION, "k.0.png": png(1)[:-30]}, r"sample 'k', image 0: cannot be decoded"),
        ({"k.json": QUESTION, "k.0.png": png(1), "k.1.png": b"GIF89a"}, r"sample 'k', image 1: cannot be decoded"),
    ],
)
def test_a_bad_sample_is_named_when_it_is_read(tmp_path: Path, members: dict, message: str) -> None:
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", {"good.json": QUESTION} | members)])
    assert dataset.read(0).answer == "3"
    with pytest.raises(ValueError, match=message):
        dataset.read(1)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.0.png": png(1)}, r"a\.tar, sample 'k': it has 0 json members"),
        ({"k.json": QUESTION, "k.0.png": png(1), "k.2.png": png(1)}, r"2 images with the numbers \[0, 2\]"),
        ({"k.json": QUESTION, "k.1.png": png(1)}, r"1 images with the numbers \[1\]"),
        ({"k.json": QUESTION, "k.0.png": png(1), "k.0.jpg": png(1)}, r"numbers \[0, 0\]"),
        ({"k.json": QUESTION, "k.png": png(1)}, r"a\.tar, member 'k\.png': it is neither"),
        ({"../k.json": QUESTION}, r"member '\.\./k\.json': an absolute path or '\.\.' is not allowed"),
        ({"a/../../k.json": QUESTION}, "is not allowed"),
        ({"/etc/k.json": QUESTION}, r"member '/etc/k\.json': an absolute path"),
        ({"README": b""}, "no samples in the shards"),
    ],
)
def test_a_bad_shard_is_named_when_it_is_opened(tmp_path: Path, members: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardDataset([write_tar(tmp_path / "a.tar", members)])


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / name, {"k.json": QUESTION}) for name in ("a.tar", "b.tar")]
    with pytest.raises(ValueError, match=r"b\.tar: the key 'k' occurs again; it is already in .*a\.tar"):
        ShardDataset(paths)


def test_a_link_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("k.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ValueError, match=r"member 'k\.json': it is not a plain file"):
        ShardDataset([tmp_path / "a.tar"])


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write_shards(prompts(2), tmp_path, "t", 2)[0].read_bytes()
    data_end = len(whole.rstrip(b"\0"))
    cut = tmp_path / "cut.tar"
    for length in range(0, data_end + 1, 97):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar.*(truncated|damaged)"):
            ShardDataset([cut])


def test_files_that_are_no_plain_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("k.json"))
    (tmp_path / "text.tar").write_text("hello " * 300)
    for name in ("z.tar", "text.tar", "absent.tar"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as an uncompressed tar"):
            ShardDataset([tmp_path / name])


def test_a_shard_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = write_shards(prompts(1), tmp_path, "t", 1)[0]
    dataset = ShardDataset([path])
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"sample 'p000': the file is shorter"):
        dataset.read(0)


# ---------------------------------------------------------------- finding shards
def test_patterns_expand_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "a.tar"):
        (tmp_path / name).touch()
    found = expand_shards([f"{tmp_path}/b-*.tar", f"{tmp_path}/a.tar", f"{tmp_path}/*.tar"], "data.train")
    assert [Path(path).name for path in found] == ["b-0.tar", "b-1.tar", "a.tar"]


def test_a_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    for pattern in (f"{tmp_path}/no-*.tar", f"{tmp_path}/folder.tar"):
        with pytest.raises(ValueError, match=r"data\.heldout: '.*\.tar' matches no file"):
            expand_shards([pattern], "data.heldout")
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        expand_shards([], "data.train")


def test_reading_needs_no_torch() -> None:
    script = "import sys, megatron_sr1.data; sys.exit('torch' in sys.modules or 'webdataset' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


# ---------------------------------------------------------------- the stream
@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ShardDataset]:
    folder = tmp_path_factory.mktemp("shards")
    return {n: ShardDataset(write_shards(prompts(n), folder, f"n{n}", 4)) for n in (1, 2, 7, 10)}


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([1, 2, 7, 10]), seed=st.integers(0, 2**40), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_cutting_gives_the_same_order(datasets: dict, size: int, seed: int, cuts: list[int]) -> None:
    whole = SampleStream(datasets[size], seed).indices(0, 40)
    borders = sorted({0, 40, *cuts})
    pieces = [
        SampleStream(datasets[size], seed).indices(start, end - start)  # a new stream each: a resumed run
        for start, end in itertools.pairwise(borders)
    ]
    assert [i for piece in pieces for i in piece] == whole


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from([1, 2, 7, 10]), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_every_epoch_holds_every_sample_once(datasets: dict, size: int, seed: int, epoch: int) -> None:
    assert sorted(SampleStream(datasets[size], seed).indices(epoch * size, size)) == list(range(size))


def test_epochs_and_seeds_have_their_own_order(datasets: dict) -> None:
    orders = {
        tuple(SampleStream(datasets[10], seed).indices(10 * epoch, 10)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_take_reads_across_an_epoch_border(datasets: dict) -> None:
    stream = SampleStream(datasets[7], 3)
    taken = stream.take(5, 6)
    assert [sample.answer for sample in taken] == [str(i) for i in stream.indices(0, 14)[5:11]]
    assert stream.take(5, 0) == []
    assert [sample.key for sample in stream.take(5, 6)] == [sample.key for sample in taken]


def test_the_order_is_pinned(datasets: dict) -> None:
    """A checkpoint's position means the same samples after an upgrade: this list must never change."""
    assert SampleStream(datasets[7], 5).indices(0, 7) == [1, 4, 2, 3, 6, 5, 0]


@pytest.mark.parametrize(("position", "count"), [(-1, 1), (0, -1)])
def test_negative_arguments_are_refused(datasets: dict, position: int, count: int) -> None:
    with pytest.raises(ValueError, match="must be 0 or more"):
        SampleStream(datasets[7], 0).take(position, count)
    with pytest.raises(ValueError, match="seed=-1"):
        SampleStream(datasets[7], -1)


def test_a_folder_stands_for_its_shards(tmp_path: Path) -> None:
    for name in ("mm[1]/test-0.tar", "mm[1]/sub/dev-0.tar", "mm[1]/test.json", "other/x.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    patterns = [str(tmp_path / "mm[1]"), str(tmp_path / "other" / "*.tar")]
    names = [str(Path(path).relative_to(tmp_path)) for path in expand_shards(patterns, "data.heldout")]
    assert names == ["mm[1]/sub/dev-0.tar", "mm[1]/test-0.tar", "other/x.tar"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.heldout: .*empty.* matches no file"):
        expand_shards([str(tmp_path / "empty")], "data.heldout")


def test_paths_are_what_a_shell_user_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there as it is written is no pattern; `~` is home; of braces every alternative must be there."""
    for name in (
        "set[v2]/train-0.tar",
        "set[v2]/train-1.tar",
        "setv/train-0.tar",
        "a[1].tar",
        "a1.tar",
        "home/x/t.tar",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for pattern, expected in (
        ("set[v2]/train-0.tar", ["set[v2]/train-0.tar"]),
        ("set[v2]/train-*.tar", ["set[v2]/train-0.tar", "set[v2]/train-1.tar"]),
        ("set[v2]", ["set[v2]/train-0.tar", "set[v2]/train-1.tar"]),
        ("set[v2]/train-{0..1}.tar", ["set[v2]/train-0.tar", "set[v2]/train-1.tar"]),
        ("a[1].tar", ["a[1].tar"]),
        ("a[12].tar", ["a1.tar"]),
        ("~/x/*.tar", [str(tmp_path / "home/x/t.tar")]),
        ("~/x", [str(tmp_path / "home/x/t.tar")]),
    ):
        assert expand_shards([pattern], "data.train") == expected, pattern
        if "{" not in pattern:
            assert [str(path) for path in find_files(pattern, (".tar",))] == expected, pattern
    with pytest.raises(ValueError, match=r"data\.train: 'set\[v2\]/train-2\.tar' matches no file"):
        expand_shards(["set[v2]/train-{0..2}.tar"], "data.train")


def test_a_shard_that_goes_away_is_tried_again_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, waits = tmp_path / "x.tar", []
    dataset = ShardDataset([write_tar(path, {"a.json": QUESTION})])
    path.rename(tmp_path / "away")

    def back(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "away").rename(path)

    monkeypatch.setattr("time.sleep", back)
    with pytest.warns(UserWarning, match=r"x\.tar: No such file or directory; trying again in 4 s"):
        assert dataset.read(0).key == "a"  # pyright: ignore[reportAttributeAccessIssue]
    assert waits == [1.0, 4.0]
    path.unlink()
    words = (
        rf"^{path}: the shard cannot be read any more \(No such file or directory\), tried 4 times in 21 s\. Restore"
    )
    with pytest.warns(UserWarning), pytest.raises(OSError, match=words):
        dataset.read(0)
