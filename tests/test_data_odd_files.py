"""Files of rows that are odd: names that are equal, parts that are missing, cells that cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sr1.config import ConfigError
from megatron_sr1.data import (
    BadSample,
    LeftOut,
    Quarantine,
    SampleFeed,
    StreamState,
    check_data,
    open_dataset,
    open_stream,
    prepare_data,
    write_shards,
)
from megatron_sr1.data.sources.parquet import may_name_files
from megatron_sr1.types import Prompt, SftSample
from tests.build_cases import picture
from tests.data_cases import encoded, prompts
from tests.test_data_rows import ROWS, built, config, opened, parquet, write_rows


def test_each_row_that_is_left_out_counts(tmp_path: Path) -> None:
    """Whatever key it has, and whatever its file is called."""
    bad = {"problem": "where?", "answer": "1", "key": "same", "image": "absent.png"}
    paths = [write_rows(tmp_path / w / "x.jsonl", [ROWS[i], bad, bad]) for i, w in enumerate(("w1", "w2"))]
    data = config(tmp_path, *paths, train_weights=(1.0, 1.0), max_bad_samples=3)
    with pytest.raises(ValueError, match=r"max_bad_samples=3 is exceeded(.|\n)*w1(.|\n)*w1(.|\n)*w2(.|\n)*w2"):
        prepare_data(data, "train", str)
    quarantine = Quarantine(4)
    open_stream(data, "train", 0, quarantine, lambda size: 1)
    assert quarantine.num_bad == 4


def test_equal_names_in_a_mixture_are_told_apart(tmp_path: Path) -> None:
    """Two data sets whose files and keys are called alike: a sample of one that is left out leaves the other's."""
    name = "train-00000-of-00001.parquet"
    for folder, start in (("w1", 0), ("w2", 3)):
        parquet(tmp_path / folder / name, ROWS[start : start + 3])
    data = config(tmp_path, tmp_path / "w1", tmp_path / "w2", train_weights=(1.0, 1.0))

    def check(sample: Prompt | SftSample) -> None:
        assert isinstance(sample, Prompt)
        if sample.answer in ("0", "1"):
            raise LeftOut(f"{sample.answer} is too long")

    def refuse(sample: Prompt | SftSample) -> None:
        raise ValueError("refused")

    quarantine = Quarantine(0)
    stream = open_stream(data, "train", 0, quarantine, lambda size: 1)
    assert len({stream.place(i) for i in range(6)}) == 6 and len({stream.key(i) for i in range(6)}) == 3
    with SampleFeed(stream, quarantine, check=check) as feed:
        found = [sample.answer for sample in feed.next(40).samples if isinstance(sample, Prompt)]
        state = StreamState.from_json(json.loads(json.dumps(feed.state().to_json())))
    assert set(found) == {"2", "3", "4", "5"} and len(quarantine.bad) == 2
    with (
        SampleFeed(stream, Quarantine(9), check=refuse) as feed,
        pytest.raises(ValueError, match=r"no sample .* refused"),
    ):
        feed.next(1)
    earlier = replace(state, bad=(BadSample(f"{Path(name).stem}-00000.tar", stream.key(0), "of an earlier release"),))
    for kept, num_bad in ((state, 2), (earlier, 0)):
        with SampleFeed(stream, again := Quarantine(0), check=check) as feed:
            feed.restore(kept)
            assert len(again.bad) == num_bad, "a name that fits two shards blocks neither"
            answers = {sample.answer for sample in feed.next(40).samples if isinstance(sample, Prompt)}
            assert answers == {"2", "3", "4", "5"}


def test_rows_that_are_left_out_are_not_of_the_stream(tmp_path: Path) -> None:
    """As many as there are samples leave the samples."""
    bad = [{"problem": f"where {i}?", "answer": "1", "image": "absent.png"} for i in range(2)]
    path = write_rows(tmp_path / "a.jsonl", [*ROWS[:4], *ROWS[:2], *bad])
    quarantine = Quarantine(2)
    stream = open_stream(config(tmp_path, path), "train", 0, quarantine, lambda size: 1)
    assert len(quarantine.bad) == stream.num_samples == 4
    with SampleFeed(stream, quarantine) as feed:
        assert {sample.key for sample in feed.next(4).samples if isinstance(sample, Prompt)} == {
            f"a-0000000{i}" for i in range(4)
        }


PATH, BYTES = pyarrow.field("path", pyarrow.string()), pyarrow.field("bytes", pyarrow.binary())


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.list_(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        pyarrow.struct([PATH]),
        pyarrow.list_(pyarrow.struct([PATH])),
        pyarrow.list_(pyarrow.struct([BYTES, PATH])),
        pyarrow.large_string(),
        pyarrow.string_view(),
    ],
    ids=str,
)
def test_an_image_file_is_noticed_however_its_path_is_written(tmp_path: Path, kind: pyarrow.DataType) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(encoded(picture(1)))
    inner = kind.value_type if pyarrow.types.is_list(kind) else kind
    value: object = {"path": "x.png"} if pyarrow.types.is_struct(inner) else "x.png"
    values = [[value] if inner is not kind else value]
    columns = {
        "problem": pyarrow.array(["q?"]),
        "answer": pyarrow.array(["1"]),
        "my.image": pyarrow.array(values, kind),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    data = config(tmp_path, tmp_path / "a.parquet", train_columns={"my.image": "images"})
    first = opened(data)
    image.write_bytes(encoded(picture(2)))
    assert opened(data).fingerprint != first.fingerprint
    assert opened(data).read(0).images[0].tobytes() == picture(2).tobytes() and len(built(tmp_path)) == 2


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.struct([BYTES, PATH])], ids=str)
def test_bytes_are_not_read_for_paths(tmp_path: Path, kind: pyarrow.DataType) -> None:
    """Rows of millions of images would be read twice."""
    value: object = encoded(picture(1))
    value = {"bytes": value, "path": "x.png"} if pyarrow.types.is_struct(kind) else value
    for inner, cell in ((kind, value), (pyarrow.list_(kind), [value])):
        pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([cell], inner)}), tmp_path / "a.parquet")
        assert not may_name_files(tmp_path / "a.parquet", {"image"})


@pytest.mark.parametrize("image", [b"", "", {"bytes": b"", "path": None}, [b""]])
def test_an_image_that_is_empty_is_unreadable(tmp_path: Path, image: object) -> None:
    """It is no question without an image: the image was lost. A null and an empty list are none."""
    path = parquet(tmp_path / "a.parquet", [{**ROWS[1], "image": image}, ROWS[0]])
    quarantine = Quarantine(1)
    assert len(open_dataset(config(tmp_path, path), "train", quarantine)) == 1
    assert "row 0: image 0: " in quarantine.bad[0].reason
    path = parquet(tmp_path / "b.parquet", [{**ROWS[1], "image": [] if isinstance(image, list) else None}, ROWS[0]])
    assert len(opened(config(tmp_path, path))) == 2


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pyarrow.array([1, 1], pyarrow.timestamp("ns")), "timestamp"),
        (pyarrow.array([b"a", b"\xff"]).view(pyarrow.string()), "utf-8"),
        (pyarrow.array([1, 2**53], pyarrow.timestamp("s")), "timestamp"),
    ],
    ids=["ns", "utf-8", "far"],
)
def test_a_cell_that_cannot_be_read_is_named(tmp_path: Path, column: pyarrow.Array, said: str) -> None:
    columns = {"problem": ["a?", "b?"], "answer": ["1", "2"], "when": column}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    row = 0 if column.type == pyarrow.timestamp("ns") else 1
    message = rf"a\.parquet, row {row}: its column 'when', .*{said}.*write the file again"
    with pytest.raises(ValueError, match=message):
        opened(config(tmp_path, tmp_path / "a.parquet"))


def test_folders_that_do_not_say_what_is_meant(tmp_path: Path) -> None:
    """Whatever would be passed over in silence is refused by its name."""
    for folder in ("mixed", "gz", "tgz", "zst"):
        write_shards(prompts(1), tmp_path / folder, "t", 1)
    write_rows(tmp_path / "mixed" / "b.jsonl", ROWS)
    for name in ("gz/b.tar.gz", "tgz/b.tgz", "zst/b.tar.zst"):
        (tmp_path / name).write_bytes(b"x")
    write_rows(tmp_path / "deep" / "x.jsonl", ROWS[:1])
    write_rows(tmp_path / "deep" / "sub" / "y.jsonl", ROWS[1:])
    for language in ("en", "de"):
        parquet(tmp_path / "languages" / language / "train-00000-of-00001.parquet", ROWS)
    parquet(tmp_path / "part" / "data" / "train-00001-of-00002.parquet", ROWS)
    for entry, message in (
        ("mixed", r"mixed holds shards \(t-00000\.tar\) and JSON Lines \(b\.jsonl\)"),
        ("gz", r"holds compressed files, b\.tar\.gz the first"),
        ("tgz", r"holds compressed files, b\.tgz the first"),
        ("zst", r"holds compressed files, b\.tar\.zst the first"),
        ("deep/*", r"data\.train: .*deep/\*' matches the folder .*deep/sub\. Make an entry of each folder"),
        ("languages", r"languages has files of one split in several folders \(.*/de, .*/en\).*de/train-\*\.parquet"),
        ("part", r"1 of 2 files train-\*-of-00002: train-00000-of-00002 is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            check_data(config(tmp_path, tmp_path / entry), "train")
    for entry, num in (("deep/**", 6), ("deep/*.jsonl", 1), ("languages/de", 6), ("languages/en/train-*.parquet", 6)):
        assert len(opened(config(tmp_path, tmp_path / entry))) == num
    (tmp_path / "part" / "images.tar.gz").write_bytes(b"x")
    parquet(tmp_path / "part" / "data" / "train-00000-of-00002.parquet", [{"problem": "other?", "answer": "1"}])
    assert len(opened(config(tmp_path, tmp_path / "part"))) == 7


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"opts": "choises"}, r"\{'opts': 'choises'\} .*Did you mean choices"),
        ({"junk": "problm"}, r"Did you mean problem"),
        ({"junk": "zzz"}, r"To keep it as metadata write \{junk: junk\}"),
    ],
)
def test_columns_become_fields_that_there_are(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    path = parquet(tmp_path / "a.parquet", [{**row, "opts": list("012345"), "junk": "z", "third": "w"} for row in ROWS])
    with pytest.raises(ConfigError, match=rf"data\.train_columns=.*{message}"):
        check_data(config(tmp_path, path, train_columns=columns), "train")
    assert not (tmp_path / "cache").exists()
    good = {"opts": "options", "junk": "junk", "third": None}
    assert opened(config(tmp_path, path, train_columns=good)).read(0).metadata == {
        "junk": "z",
        "choices": tuple("012345"),
    }
