"""`data.train` and its kin of other files than shards: Parquet, JSON Lines, data set folders; built once, cached."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from megatron_sr1.config import ConfigError, DataConfig, load_config
from megatron_sr1.data import (
    MissingFiles,
    Quarantine,
    SampleFeed,
    ShardDataset,
    check_data,
    expand_shards,
    file_systems,
    files_of,
    open_dataset,
    open_stream,
    prepare_data,
    write_shards,
)
from megatron_sr1.data.build import cached
from megatron_sr1.data.build.journal import Journal
from tests.build_cases import REASONED, SEE_THINK, load_tool, many, picture, run, write_jsonl
from tests.build_cases import files_of as hashes_of
from tests.data_cases import encoded, equal, prompts
from tests.test_data_remote import Bucket

ROWS = [{"problem": f"q{i}?", "answer": str(i)} for i in range(6)]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


def config(folder: Path, *train: Path | str, **more: Any) -> DataConfig:
    return DataConfig(train=tuple(map(str, train)), cache_dir=str(folder / "cache"), **more)


def opened(data: DataConfig, budget: int = 0) -> ShardDataset:
    return open_dataset(data, "train", Quarantine(budget))


def answers(data: DataConfig) -> list[str]:
    found = opened(data)
    return [found.read(i).answer for i in range(len(found))]


def built(folder: Path) -> list[Path]:
    """The folders of the cache."""
    return sorted(path for path in (folder / "cache" / "built").glob("*") if path.is_dir())


def parquet(path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows]), path, **options)
    return path


def shown_rows(start: int, num: int = 5) -> list[dict[str, Any]]:
    """As `datasets` writes them, with options and numbers."""
    return [
        {
            "question": f"<image>\nHow many in {i}?",
            "solution": i,
            "images": [{"bytes": encoded(picture(i), "JPEG"), "path": f"{i}.jpg"}],
            "choices": [str(i), "none"],
            "level": f"grade {i}",
        }
        for i in range(start, start + num)
    ]


def hub_folder(folder: Path) -> Path:
    parquet(folder / "data" / "train-00000-of-00002.parquet", shown_rows(10))
    parquet(folder / "data" / "train-00001-of-00002.parquet", shown_rows(15))
    parquet(folder / "data" / "test-00000-of-00001.parquet", shown_rows(30))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "train.jsonl").write_text("hidden\n")
    return folder


RENAMED = {"question": "problem", "solution": "answer"}


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


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
