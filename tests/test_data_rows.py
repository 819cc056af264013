"""`data.train` and its kin of other files than shards: Parquet, JSON Lines, data set folders, behind URLs too."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from megatron_sr1.config import DataConfig
from megatron_sr1.data import (
    Quarantine,
    SampleFeed,
    ShardDataset,
    check_data,
    expand_shards,
    file_systems,
    files_of,
    open_dataset,
    open_stream,
    write_shards,
)
from megatron_sr1.data.build import cached
from tests.build_cases import REASONED, SEE_THINK, load_tool, many, picture, run, write_jsonl
from tests.build_cases import files_of as hashes_of
from tests.data_cases import encoded, equal, prompts
from tests.row_cases import RENAMED, ROWS, answers, built, config, hub_folder, opened, parquet, shown_rows, write_rows
from tests.test_data_remote import Bucket


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


# ---------------------------------------------------------------- the same samples as the tool's
def test_they_are_what_the_tool_builds(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, fields, bytes of images: the tars are equal byte for byte; several row groups, several shards."""
    monkeypatch.setattr(cached, "MAX_SHARD_BYTES", 20_000)
    table = parquet(tmp_path / "my.parquet", shown_rows(10, 9), row_group_size=4)
    lines = many(tmp_path / "lines", 40) / "data.jsonl"
    demos = write_jsonl(tmp_path / "demos", [
        {"problem": "Which?", "answer": SEE_THINK, "images": ["r.png"]},
        {"problem": "Which?", "description": "a dial", "response": REASONED},
    ], {"r.png": encoded(picture(1))}) / "data.jsonl"  # fmt: skip
    hub = hub_folder(tmp_path / "hub")
    rename = ["--rename", *(f"{column}={to}" for column, to in RENAMED.items())]
    for number, (entry, columns, arguments) in enumerate((
        (table, RENAMED, (table, "--format", "parquet", *rename, "--name", "my")),
        (lines, {}, (lines, "--format", "jsonl", "--name", "data")),
        (demos, {}, (demos, "--format", "jsonl", "--name", "data")),
        (hub, RENAMED, (hub / "data" / "train*", "--format", "parquet", *rename, "--name", "train-00000-of-00002")),
        (f"{hub}:test", RENAMED, (hub / "data" / "test*", "--format", "parquet", *rename,
                                  "--name", "test-00000-of-00001")),
    )):  # fmt: skip
        data = config(tmp_path, entry, train_columns=columns)
        assert check_data(data, "train") == (
            [f"data.train: {hub} has the splits test, train: train is read"] if entry == hub else []
        )
        before, out = set(built(tmp_path)), tmp_path / f"out-{number}"
        found = opened(data)
        run(tool, "--input", *arguments, "--out", out, "--max-shard-mb", 0.02)
        expected = ShardDataset(expand_shards([str(out)], "out"))
        assert found.fingerprint == expected.fingerprint and len(found) > 1
        assert all(equal(found.read(i), expected.read(i)) for i in range(len(found)))
        (folder,) = set(built(tmp_path)) - before
        tars = {name: sha for name, sha in hashes_of(out).items() if name.endswith((".tar", ".index.json"))}
        assert tars == {name: sha for name, sha in hashes_of(folder).items() if name in tars} and len(tars) >= 2


def test_one_line_is_enough(tmp_path: Path) -> None:
    """Relative, from home, by pattern, of several splits by braces, mixed with shards; a stream with weights."""
    parquet(tmp_path / "a-1.parquet", ROWS[:2])
    parquet(tmp_path / "a-2.parquet", [{**row, "problem": f"again {row['problem']}"} for row in ROWS[:3]])
    (tmp_path / "rows.json").write_text(json.dumps({"data": ROWS[3:5]}))
    shards = write_shards(prompts(3), tmp_path / "tars", "t", 2)
    data = config(tmp_path, tmp_path / "a-*.parquet", tmp_path / "rows.json", tmp_path / "tars")
    assert answers(data) == ["0", "1", "0", "1", "2", "3", "4", "0", "1", "2"]
    assert len(built(tmp_path)) == 2
    mixed = config(tmp_path, tmp_path / "a-*.parquet", tmp_path / "tars", train_weights=(3.0, 1.0))
    stream = open_stream(mixed, "train", 5, Quarantine(0), None)
    keys = [stream.key(i) for i in stream.indices(0, 400)]
    assert 290 < sum(key.startswith("a-") for key in keys) < 310
    with SampleFeed(stream, Quarantine(0), workers=2) as feed:
        assert len(feed.next(8).samples) == 8
    both = hub_folder(tmp_path / "hub")
    data = config(tmp_path, f"{both}:{{train,test}}", train_columns=RENAMED)
    assert len(opened(data)) == 15
    assert [*files_of(config(tmp_path, *shards), "train")] == [str(path) for path in shards]
    assert len(files_of(data, "train")) == 3


def test_equal_names_of_files_give_different_keys(tmp_path: Path) -> None:
    for number in range(3):
        parquet(tmp_path / f"set{number}" / "train.parquet", [{**row, "problem": f"{number}"} for row in ROWS[:1]])
    data = config(tmp_path, *(tmp_path / f"set{number}" for number in range(3)))
    found = opened(data)
    keys = [found.describe(i).key for i in range(3)]
    assert keys == ["train-00000000", "00001-train-00000000", "00002-train-00000000"]
    alone = opened(config(tmp_path, tmp_path / "set1"))
    assert alone.describe(0).key == "train-00000000", "as the tool says it"


# ---------------------------------------------------------------- splits
def test_splits_by_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    for name in ("easy/a.parquet", "easy/b.parquet", "hard/c.parquet"):
        parquet(folder / name, ROWS[: 1 + "abc".index(Path(name).stem)])

    def card(configs: str) -> None:
        (folder / "README.md").write_text(f"---\nlicense: mit\n{configs}---\n# A set\n")

    def number(entry: str) -> int | str:
        try:
            return len(opened(config(tmp_path, entry)))
        except ValueError as error:
            return str(error)

    easy = "- config_name: easy\n  data_files:\n  - {split: train, path: easy/a*}\n  - {split: test, path: [easy/b*]}\n"
    card(f"configs:\n{easy}")
    assert (number(f"{folder}"), number(f"{folder}:test"), number(f"{folder}:easy/test")) == (1, 2, 2)
    card(f"configs:\n{easy}- config_name: hard\n  data_dir: hard\n")
    assert "several configurations (easy, hard)" in str(number(f"{folder}"))
    assert (number(f"{folder}:easy/train"), number(f"{folder}:hard/")) == (1, 3)
    card(f"configs:\n{easy}- config_name: hard\n  default: true\n  data_files: hard/*.parquet\n")
    assert (number(f"{folder}"), number(f"{folder}:train"), number(f"{folder}:easy/test")) == (3, 3, 2)
    assert "no split 'test': it has train" in str(number(f"{folder}:test"))
    assert "no configuration 'mid': it has easy, hard" in str(number(f"{folder}:mid/test"))
    for wrong, message in (
        ("configs:\n- config_name: a\n  data_files: ../*.parquet\n", "leads outside"),
        ("configs:\n- config_name: a\n  data_files: none/*\n", "no such file"),
        ("configs:\n- config_name: a\n  data_files: [{split: train}]\n", "list of {split, path}"),
        (
            "configs:\n- config_name: a\n  data_files: [{split: a, path: hard/*}, {split: a, path: y}]\n",
            "{split, path}",
        ),
        ("configs:\n- config_name: a\n  data_files: README.md\n", "none of .parquet"),
        ("configs: [a]\n", "list of mappings"),
        ("configs: [a\n", "no YAML"),
    ):
        card(wrong)
        assert message in str(number(f"{folder}")), wrong
    (folder / "README.md").write_text("---\n a heading: [\n---\nno card\n")
    assert "several splits" not in str(number(f"{folder}"))


def test_images_by_their_whole_paths(tmp_path: Path) -> None:
    """Below the folder of the file; elsewhere they are refused, as data must not name any file of the machine."""
    (tmp_path / "rows").mkdir()
    for folder in (tmp_path / "rows", tmp_path):
        picture(0, (56, 56)).save(folder / "i.png")
    rows = [{"problem": "<image>q?", "answer": "1", "image": str(tmp_path / "rows" / "i.png")}]
    assert len(opened(config(tmp_path, write_rows(tmp_path / "rows" / "a.jsonl", rows)))) == 1
    rows[0]["image"] = str(tmp_path / "i.png")
    with pytest.raises(ValueError, match="leads outside of"):
        opened(config(tmp_path, write_rows(tmp_path / "rows" / "b.jsonl", rows)))


def test_a_split_that_was_not_fetched_is_missed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    splits = "\n".join(f"  - split: {name}\n    path: data/{name}-*" for name in ("train", "validation"))
    folder.mkdir()
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}\n---\n")
    parquet(folder / "data" / "train-00000-of-00001.parquet", ROWS[:5])
    assert len(opened(config(tmp_path, folder))) == len(opened(config(tmp_path, f"{folder}:train"))) == 5
    with pytest.raises(ValueError, match="names files of this split, and none of them is there"):
        check_data(config(tmp_path, f"{folder}:val"), "train")
    for wrong in ("hard_train", "train_small", "not-train", "TRAINS"):
        with pytest.raises(ValueError, match=f"there is no split '{wrong}'"):
            check_data(config(tmp_path, f"{folder}:{wrong}"), "train")
    parquet(folder / "data" / "validation-00000-of-00001.parquet", ROWS[:3])
    for split in ("val", "validation"):
        assert len(opened(config(tmp_path, f"{folder}:{split}"))) == 3


def test_splits_by_names(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    parquet(folder / "train" / "geo" / "0.parquet", ROWS[:1])
    assert check_data(config(tmp_path, folder), "train") == [f"data.train: {folder}: its only split, train, is read"]
    parquet(folder / "val" / "geo" / "0.parquet", ROWS[:2])
    data = DataConfig(heldout=(str(folder),), cache_dir=str(tmp_path / "cache"))
    message = rf"{folder} has several splits \(train, validation\)\. Say which is meant: {folder}:SPLIT"
    with pytest.raises(ValueError, match=message):
        check_data(data, "heldout")
    data = DataConfig(heldout=(f"{folder}:validation",), cache_dir=str(tmp_path / "cache"))
    assert check_data(data, "heldout") == [] and len(open_dataset(data, "heldout", Quarantine(0))) == 2
    parquet(folder / "testmini-00000-of-00001.parquet", ROWS[:3])
    assert len(opened(config(tmp_path, f"{folder}:testmini"))) == 3
    parquet(folder / "more.parquet", ROWS)
    with pytest.raises(ValueError, match=r"and more\.parquet, which names none"):
        check_data(config(tmp_path, folder), "train")
    only = tmp_path / "other"
    parquet(only / "test.parquet", ROWS[:1])
    parquet(only / "dev.parquet", ROWS[:1])
    with pytest.raises(ValueError, match="several splits"):
        check_data(config(tmp_path, only), "train")


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    for split, num in (("train", 2), ("test", 3)):
        (folder / split).mkdir(parents=True)
        table = pyarrow.Table.from_pylist(ROWS[:num])
        for name in ("data-00000-of-00001.arrow", "cache-1234.arrow"):  # a cache of `map` is no part of it
            with pyarrow.ipc.new_stream(str(folder / split / name), table.schema) as writer:
                writer.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (folder / split / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [len(opened(config(tmp_path, f"{folder}{split}"))) for split in ("", ":test", "/test")] == [2, 3, 3]
    (folder / "train" / "state.json").write_text(json.dumps({**state, "_indices_files": [{"filename": "x"}]}))
    with pytest.raises(ValueError, match="flatten_indices"):
        check_data(config(tmp_path, folder), "train")
    for damage in ("{", "[]", "{}"):
        (folder / "train" / "state.json").write_text(damage)
        with pytest.raises(ValueError, match="data set is damaged"):
            check_data(config(tmp_path, folder), "train")


# ---------------------------------------------------------------- behind URLs
@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setattr(file_systems, "RETRY_SECONDS", (0.0,))
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield fsspec.filesystem("bucket")
    Bucket.store.clear()
    Bucket.refuses, Bucket.cut = [], False


def test_rows_behind_urls(bucket: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    """Downloaded to be built, once for each version; the copies go; keys are those of the file's name."""
    for number in range(2):
        path = parquet(tmp_path / "p" / f"t{number}.parquet", ROWS[2 * number : 2 * number + 2])
        bucket.pipe_file(f"bucket://b/t{number}.parquet", path.read_bytes())
    data = config(tmp_path, "bucket://b/t{0..1}.parquet")
    assert check_data(data, "train") == [] and not (tmp_path / "cache").exists(), "a dry run asks nobody"
    found = opened(data)
    assert [found.describe(i).key for i in range(4)] == [f"t{i}-0000000{j}" for i in range(2) for j in range(2)]
    assert answers(data) == ["0", "1", "2", "3"]
    (folder,) = built(tmp_path)
    assert not list(folder.rglob("*.parquet"))
    changed = parquet(tmp_path / "p" / "t1.parquet", [{"problem": "new", "answer": "9"}])
    bucket.pipe_file("bucket://b/t1.parquet", changed.read_bytes())
    assert answers(data) == ["0", "1", "9"] and len(built(tmp_path)) == 2
    bad = [{"problem": "where?", "answer": "1", "image": "x.png"}]
    bucket.pipe_file("bucket://b/r.jsonl", write_rows(tmp_path / "r.jsonl", [*ROWS, *bad]).read_bytes())
    with pytest.raises(ValueError, match=r"^bucket://b/r\.jsonl, line 7: image 0"):
        opened(config(tmp_path, "bucket://b/r.jsonl"))
    Bucket.cut = True
    bucket.pipe_file("bucket://b/cut.jsonl", b'{"problem": "a", "answer": "1"}\n' * 2)
    with pytest.raises(OSError, match="bytes came"):
        opened(config(tmp_path, "bucket://b/cut.jsonl"))
    Bucket.cut = False
    assert len(opened(config(tmp_path, "bucket://b/cut.jsonl"))) == 1
    with pytest.raises(ValueError, match=r"bucket://b/t0\.parquet is named twice"):
        check_data(config(tmp_path, "bucket://b/t{0..1}.parquet", "bucket://b/t0.parquet"), "train")
    with pytest.raises(ValueError, match="nothing here opens"):
        check_data(config(tmp_path, "zzz://b/t.parquet"), "train")


def test_a_server_that_tells_no_version(
    bucket: fsspec.AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe_file("bucket://b/t.jsonl", b"{}\n")
    for lacks in ("created", "size"):
        monkeypatch.setattr(
            Bucket, "info", lambda self, path, lacks=lacks, **_: {"size": 3, "created": "now", lacks: None}
        )
        with pytest.raises(ValueError, match=re.escape("bucket://b/t.jsonl: the server does not tell")):
            opened(config(tmp_path, "bucket://b/t.jsonl"))
