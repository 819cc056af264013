"""What of files of rows is refused or left out, before anything is written where that can be told."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sr1.config import ConfigError, DataConfig, load_config
from megatron_sr1.data import (
    MissingFiles,
    Quarantine,
    check_data,
    expand_shards,
    open_dataset,
    prepare_data,
    write_shards,
)
from tests.data_cases import prompts
from tests.row_cases import RENAMED, ROWS, built, config, opened, parquet, write_rows


# ---------------------------------------------------------------- refused
def test_what_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    good = parquet(tmp_path / "good.parquet", ROWS)
    write_shards(prompts(1), tmp_path / "both", "t", 1)
    parquet(tmp_path / "both" / "a.parquet", ROWS)
    write_shards(prompts(1), tmp_path / "tars", "t", 1)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.json").write_text("[]")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS)[:0], tmp_path / "none.parquet")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-9])
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    parquet(tmp_path / "other.parquet", [{"question": "a?", "solution": "1"}])
    (tmp_path / "array.jsonl").write_text("[{}]")
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8b")
    parquet(tmp_path / "loop" / "a.parquet", ROWS)
    (tmp_path / "loop" / "down").mkdir()
    (tmp_path / "loop" / "down" / "up").symlink_to(tmp_path / "loop")
    parquet(tmp_path / "broken" / "a.parquet", ROWS)
    (tmp_path / "broken" / "b.parquet").symlink_to(tmp_path / "absent")
    write_rows(tmp_path / "two" / "a.jsonl", ROWS)
    parquet(tmp_path / "two" / "b.parquet", ROWS)
    (tmp_path / "link.parquet").symlink_to(good)
    for number, (entries, more, message) in enumerate((
        (["both"], {}, r"both holds shards \(t-00000\.tar\) and Parquet \(a\.parquet\)"),
        (["two"], {}, r"names files of several kinds: .*a\.jsonl \(jsonl\), .*b\.parquet \(parquet\)"),
        (["good.parquet", "link.parquet"], {}, r"link\.parquet is named twice"),
        (["good.parquet", "good.parquet"], {"train_weights": (1.0, 2.0)}, r"is named twice"),
        (["empty.jsonl"], {}, r"data\.train: .*empty\.jsonl: the file is empty"),
        (["blank.json"], {}, r"blank\.json: there are no rows"),
        (["none.parquet"], {}, r"none\.parquet: there are no rows"),
        (["cut.parquet"], {}, r"cut\.parquet: cannot be read .* truncated or damaged"),
        (["pointer.parquet"], {}, r"git lfs pull"),
        (
            ["other.parquet"], {},
            r"other\.parquet has the columns question, solution; needed .* data\.train_columns\.question=problem",
        ),
        (["array.jsonl"], {}, r"array of JSON, not one object a line\. Call it \*\.json"),
        (["rows.jsonl.gz"], {}, r"rows\.jsonl\.gz is compressed"),
        (["loop"], {}, r"loop/down/up is a link to a folder that it lies in"),
        (["broken"], {}, r"broken/b\.parquet: the file is not there"),
        (["good.parquet"], {"train_columns": {"anwser": "answer"}}, r"data\.train_columns='anwser' is not allowed"),
        (["tars"], {"train_columns": {"a": "b"}}, r"data\.train_columns=\{'a': 'b'\} .* shards alone"),
        (["good.parquet"], {"max_prompt_tokens": 9}, r"data\.max_prompt_tokens=9 is not allowed"),
        (["good.parquet:train"], {}, "matches no file"),
        (["tars:train"], {}, "matches no file"),
    )):  # fmt: skip
        data = config(tmp_path / str(number), *(tmp_path / entry for entry in entries), **more)
        with pytest.raises(ValueError, match=message):
            check_data(data, "train")
        assert not (tmp_path / str(number)).exists()
        with pytest.raises(ValueError, match=message):
            prepare_data(data, "train", str)
    with pytest.raises(MissingFiles):
        check_data(config(tmp_path, tmp_path / "absent.parquet"), "train")
    loose = config(tmp_path, good, tmp_path / "other.parquet", train_columns=RENAMED)
    assert check_data(loose, "train") == [] and len(opened(loose)) == 7, "columns are of some entry"


def test_rows_that_are_left_out_are_bad_samples(tmp_path: Path) -> None:
    """A repetition is not: the tool leaves it out, too."""
    rows = [*ROWS, ROWS[0], {"problem": "where?", "answer": "1", "image": "absent.png"}, {"question": "a"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    data, said = config(tmp_path, path), list[str]()
    message = r"a\.jsonl, line 8: image 0: .*absent\.png.*data\.max_bad_samples"
    with pytest.raises(ValueError, match=message):
        prepare_data(data, "train", said.append)
    assert said[-1] == "data.train: 6 samples; left out: 1 duplicate, 1 field, 1 unreadable_image"
    with pytest.raises(ValueError, match=message):
        opened(data)
    quarantine = Quarantine(2, tmp_path / "quarantine.jsonl")
    assert len(open_dataset(data, "train", quarantine)) == 6
    assert [(bad.shard, bad.key, bad.counts) for bad in quarantine.bad] == [
        (f"{path}, line 7", "a-00000006", False),
        (f"{path}, line 8", "a-00000007", True),
        (f"{path}, line 9", "a-00000008", True),
    ]
    assert "name it with data.train_columns.COLUMN=problem" in quarantine.bad[-1].reason
    with pytest.raises(ValueError, match=r"data\.train: no sample is left of 1"):
        opened(config(tmp_path, write_rows(tmp_path / "b.jsonl", [{"question": "a"}])))


def test_a_file_that_disappears(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    data = config(tmp_path, path)
    assert len(opened(data)) == 6
    path.unlink()
    with pytest.raises(MissingFiles, match="matches no file"):
        opened(data)


@pytest.mark.parametrize(
    "word",
    ["data.train_columns.a=true", "data.train_columns={1: b}", "data.train_columns.a=3", "data.heldout_columns=[a]",
     "data.cold_start_columns=a", "data.train_columns={'': a}"],
)  # fmt: skip
def test_columns_are_texts(word: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.\w+_columns"):
        load_config(None, [word])


def test_columns_are_configured() -> None:
    words = ["data.train_columns.question=problem", "data.train_columns.level=", "data.heldout_columns={q: problem}"]
    data = load_config(None, words).data
    assert data.train_columns == {"question": "problem", "level": None} and data.heldout_columns == {"q": "problem"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"problem,answer\na,b\n", "x.csv is none of what is read: shards (*.tar), .parquet"),
        ("x.feather", b"ARROW1", "x.feather is none of what is read"),
        (
            "x.jsonl",
            gzip.compress(b'{"problem": "q", "answer": "a"}', mtime=0),
            "it is compressed (gzip), whatever its name says",
        ),
        ("x.json", b'{"problem": "q"}\n{"problem": "r"}\n', "Where each line is a sample, call it *.jsonl"),
    ],
)
def test_files_of_other_kinds_than_they_are_taken_for(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        check_data(config(tmp_path, tmp_path / name), "train")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name",
    ["pipe:curl -s https://h/x.zip | funzip", "hf://datasets/a/b/train-0000", "https://h.md/t"],
)
def test_what_may_be_a_shard_is_one(name: str, tmp_path: Path) -> None:
    assert expand_shards([name], "data.train") == [name]


@pytest.mark.parametrize(
    "url", ["hf://datasets/a/b", "hf://datasets/a/b-v1.5", "file:///data/a#1.jsonl", "file:///data/a?1.jsonl"]
)
def test_urls_that_name_no_file_are_refused_before_anybody_is_asked(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no file|# and \? end the name"):
        check_data(config(tmp_path, url), "train")


def test_a_cache_must_be_a_folder(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "cache").write_text("")
    for folder in (tmp_path, tmp_path / "cache"):
        with pytest.raises(ConfigError, match=r"data\.cache_dir=.* a folder, and .*cache is none"):
            check_data(config(folder, rows), "train")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for odd in (str(tmp_path / "circle"), "~nobody-of-this-name/x"):
        with pytest.raises(ConfigError, match=r"data\.cache_dir=.* is not allowed"):
            check_data(DataConfig(train=(str(rows),), cache_dir=odd), "train")
    write_shards(prompts(1), tmp_path / "tars", "t", 1)
    shards = DataConfig(train=(f"{tmp_path}/tars/*.tar",), cache_dir=str(tmp_path / "cache"))
    assert len(open_dataset(shards, "train", Quarantine(0))) == 1, "of local shards it is not needed"
    with pytest.raises(ConfigError, match=r"data\.cache_dir='' is not allowed"):
        DataConfig(cache_dir="")


def test_columns_the_wrong_way_round_are_told_the_right_one(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "q", "answer": "1"}])
    with pytest.raises(ConfigError, match=re.escape("Did you mean {question: problem}?")):
        check_data(config(tmp_path, rows, train_columns={"problem": "question"}), "train")


def test_keys_that_two_files_share_are_told_with_the_files_and_the_remedy(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", [{"key": "r0", "problem": name, "answer": "1"}]) for name in "ab"]
    with pytest.raises(ValueError, match="the key 'r0' occurs again") as caught:
        opened(config(tmp_path, *files))
    told = str(caught.value)
    assert "a.jsonl" in told and "b.jsonl" in told and "data.train_columns={key: null}" in told and ".tar" not in told
    assert len(opened(config(tmp_path, *files, train_columns={"key": None}))) == 2
    files = [write_rows(tmp_path / f"{name}.jsonl", [{"id": "r0", "problem": name, "answer": "1"}]) for name in "ab"]
    with pytest.raises(ValueError, match=r"data\.train_columns=\{id: null\}"):
        opened(config(tmp_path, *files, train_columns={"id": "key"}))


def test_a_build_whose_notes_lack_a_part_is_named(tmp_path: Path) -> None:
    data = config(tmp_path, write_rows(tmp_path / "rows.jsonl", ROWS))
    opened(data)
    (folder,) = built(tmp_path)
    (folder / "inputs.json").write_text("{}")
    with pytest.raises(ValueError, match=r"inputs\.json: it cannot be read .*Remove .*, to build it again"):
        opened(data)
