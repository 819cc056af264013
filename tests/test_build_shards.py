"""tools/build_shards.py: three kinds of input, everything that is left out, the same bytes always, and the check."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from megatron_sr1.data.build.samples import Question, build_sample
from megatron_sr1.data.choices import ANSWER_WITH_LETTER
from megatron_sr1.data.index import index_path, read_index
from megatron_sr1.data.schema import decode_sample
from megatron_sr1.data.sources.files import find_files, key_prefixes
from megatron_sr1.data.sources.source import PROBLEM_KINDS, Problem, RawSample
from megatron_sr1.prompts import CAPTION_REASONER
from megatron_sr1.prompts import SEE_THINK as FIRST
from megatron_sr1.types import SftSample
from tests.build_cases import (
    REASONED,
    SEE_THINK,
    dataset,
    load_tool,
    many,
    picture,
    pixels,
    problems,
    run,
    run_jsonl,
    samples,
)
from tests.data_cases import encoded

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


# ---------------------------------------------------------------- inputs
@needs_pyarrow
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_hugging_face_folders(tool: ModuleType, tmp_path: Path, suffix: str) -> None:
    """As `datasets` writes them: images are structs of bytes and path, several row groups or batches."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "problem": f"<image>\nHow many in {i}?",
            "answer": i,  # a number; answers are text
            "images": [{"bytes": encoded(picture(i), "JPEG"), "path": f"{i}.jpg"}],
            "choices": ["1", "2"] if i == 0 else None,
            "level": {"grade": i},
        }
        for i in range(7)
    ]
    rows[3]["images"] = [{"bytes": None, "path": "more/x.png"}]
    folder = tmp_path / "in" / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "x.png").write_bytes(encoded(picture(99)))
    table = pyarrow.Table.from_pylist(rows)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=3)
    else:
        with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    run(tool, "--input", folder, "--format", "parquet", "--out", tmp_path / "out")
    found = samples(tmp_path / "out")
    asked = [(f"How many in {i}?", str(i)) for i in range(1, 7)]
    assert [(sample.problem, sample.answer) for sample in found[1:]] == asked
    assert (found[0].problem, found[0].answer) == (f"How many in 0?\n(A) 1\n(B) 2\n{ANSWER_WITH_LETTER}", "A")
    assert found[0].metadata == {"choices": ("1", "2"), "level": {"grade": 0}}
    assert [sample.metadata["level"] for sample in found[1:]] == [{"grade": i} for i in range(1, 7)]
    shown = [Image.open(io.BytesIO(row["images"][0]["bytes"] or encoded(picture(99)))) for row in rows]
    assert [pixels(sample.images) for sample in found] == [[image.tobytes()] for image in shown]
    assert len({sample.key for sample in found}) == 7


@needs_pyarrow
def test_parquet_columns_are_checked_and_renamed(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "one?", "solution": "1", "image": encoded(picture(1)), "huge": b"x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    call = ("--format", "parquet", "--out", tmp_path / "out", "--input")
    for arguments, message in (
        ((tmp_path / "a.parquet",), "columns question, solution, image, huge; needed are problem"),
        ((tmp_path / "a.parquet", "--rename", "question=problem", "absent=answer"), "absent is not there"),
        ((tmp_path / "cut.parquet",), "truncated or damaged"),
    ):
        with pytest.raises(SystemExit):
            run(tool, *call, *arguments)
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    run(
        tool,
        *call,
        tmp_path / "a.parquet",
        "--rename",
        "question=problem",
        "solution=answer",
        "huge=",
    )
    (sample,) = samples(tmp_path / "out")
    assert (sample.problem, sample.answer, sample.metadata) == ("one?", "1", {})
    assert pixels(sample.images) == [picture(1).tobytes()]


def test_jsonl_with_an_image_folder(tool: ModuleType, tmp_path: Path) -> None:
    """Bytes of PNG, JPEG and WebP are kept; other formats become PNG; nothing outside the folder is read."""
    images = {f"i/{kind}": encoded(picture(3), kind) for kind in ("PNG", "JPEG", "WEBP", "MPO", "BMP", "TIFF")}
    (tmp_path / "secret.png").write_bytes(encoded(picture(4)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")  # put there on purpose
    rows = [
        {"problem": "many", "answer": "1", "images": [*images], "source": "s", "metadata": {"a": [1]}},
        {"problem": "text alone", "answer": 2.5},
        "",
        {"problem": "outside", "answer": "1", "images": ["../secret.png"]},
        {"problem": "root", "answer": "1", "images": [str(tmp_path / "secret.png")]},
        {"problem": "missing", "answer": "1", "images": ["i/none.png"]},
        "{broken",
        "[1]",
        {"key": "own/key", "problem": "own key", "answer": "1", "images": ["./link.png"]},
    ]
    out = run_jsonl(tool, tmp_path, rows, images)
    first, second, third = samples(out)
    assert (first.source, first.metadata, second.answer, third.key) == ("s", {"a": [1]}, "2.5", "own/key")
    stored = read_index(index_path(out / "train-00000.tar")).samples[0]
    assert stored.extensions == ("0.png", "1.jpg", "2.webp", "3.jpg", "4.png", "5.png", "json")
    with open(out / "train-00000.tar", "rb") as shard:
        for data, offset, size in zip(images.values(), stored.offsets[:4], stored.sizes[:4], strict=False):
            shard.seek(offset)
            assert shard.read(size) == data
    assert pixels(first.images)[4:] == [picture(3).tobytes()] * 2
    kinds = [(problem["kind"], problem["where"].rpartition(" ")[2]) for problem in problems(out)]
    assert kinds == [*(("unreadable_image", line) for line in "456"), *(("unreadable_sample", line) for line in "78")]


def test_existing_webdataset(tool: ModuleType, tmp_path: Path) -> None:
    """Written by the plain library and by tar; keys are kept, images in numeric order."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            question = {"problem": f"q{i}", "answer": str(i), "key": "ignored"}
            writer.write({"__key__": f"s/{i}", "json": question, "jpg": encoded(picture(i), "JPEG")})
        many_images = {f"{n}.png": encoded(picture(n)) for n in range(12)}
        writer.write({"__key__": "many", "json": {"problem": "m", "answer": "1"}, **many_images})
        writer.write({"__key__": "other", "json": {"problem": "m", "answer": "1"}, "cls": b"1"})
        writer.write({"__key__": "gap", "json": {"problem": "m", "answer": "1"}, "1.png": encoded(picture(1))})
        writer.write({"__key__": "lonely", "png": encoded(picture(1))})
    source = tmp_path / "b"
    source.mkdir()
    (source / "t.json").write_text(json.dumps({"problem": "by tar", "answer": "1"}))
    (source / "link.json").symlink_to(source / "t.json")
    subprocess.run(["tar", "-cf", tmp_path / "b.tar", "-C", source, "t.json", "link.json"], check=True)
    run(tool, "--input", tmp_path / "*.tar", "--format", "webdataset", "--out", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert [sample.key for sample in found] == ["s/0", "s/1", "s/2", "many", "t"]
    assert pixels(found[3].images) == [picture(n).tobytes() for n in range(12)]
    assert {problem["key"] for problem in problems(tmp_path / "out")} == {"other", "gap", "lonely", "link"}
    # once more, from the shards just built: nothing is left out, nothing changes but the order of nothing
    run(tool, "--input", tmp_path / "out", "--format", "webdataset", "--out", tmp_path / "again")
    assert (tmp_path / "again/train-00000.tar").read_bytes() == (tmp_path / "out/train-00000.tar").read_bytes()
    assert problems(tmp_path / "again") == []


def test_chunks_of_a_large_tar_are_read_from_their_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sr1.data.sources import webdataset
    from megatron_sr1.data.sources.columns import Columns

    monkeypatch.setattr(webdataset, "BYTES_PER_CHUNK", 5000)
    keys = [f"{'long' * (40 * (i % 3))}{i:04d}" for i in range(40)]  # some need a pax header
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for key in keys:
            data = json.dumps({"problem": key, "answer": "1"}).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = webdataset.WebDatasetSource(str(tmp_path / "a.tar"), Columns())
    chunks = list(source.chunks())
    assert len(chunks) > 5 and sum(chunk.num_rows for chunk in chunks) == 40
    assert [sample.key for chunk in chunks for sample in source.read(chunk)] == keys
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"cut\.tar.*truncated or damaged"):
        list(webdataset.WebDatasetSource(str(tmp_path / "cut.tar"), Columns()).chunks())


def test_demonstrations(tool: ModuleType, tmp_path: Path) -> None:
    png = {"a.png": encoded(picture(1))}
    rows = [
        {"problem": "1", "answer": "3", "response": SEE_THINK, "images": ["a.png"]},
        {"problem": "2", "response": SEE_THINK, "images": ["a.png"]},  # the answer is in the box
        {"problem": "3", "answer": SEE_THINK, "images": ["a.png"]},  # the response is in the column of answers
        {"problem": "4", "response": REASONED, "description": "a dial at 3"},
        {"problem": "5", "response": REASONED, "images": ["a.png"]},  # not a See-Think response
        {"problem": "6", "response": REASONED, "description": "a dial", "images": ["a.png"]},
        {"problem": "7", "response": REASONED, "template": "unknown"},
        {"problem": "8", "response": REASONED, "template": "cot", "images": ["a.png"]},
    ]
    out = run_jsonl(tool, tmp_path, rows, png)
    found = [sample for sample in samples(out) if isinstance(sample, SftSample)]
    assert [(sample.prompt.problem, sample.template, sample.response) for sample in found] == [
        *((number, "see_think", SEE_THINK) for number in "123"),
        ("4", "caption_reasoner", REASONED),
        ("8", "cot", REASONED),
    ]
    assert {sample.prompt.answer for sample in found} == {"3"} and found[3].description == "a dial at 3"
    assert [problem["kind"] for problem in problems(out)] == ["response", "field", "field"]


@pytest.mark.parametrize(
    "names, message",
    [
        (["train-0.parquet", "test-0.parquet"], "several splits (test in test-0.parquet, train"),
        (["train/0.parquet", "validation/0.parquet"], "several splits (train in 0.parquet, validation"),
        (["geo_train.parquet", "geo_test.parquet"], "several splits (test in geo_test.parquet"),
        (["train2014.parquet", "val2014.parquet"], "several splits (train in train2014"),
        (["data.parquet", "test.parquet"], "several splits (no split in data.parquet, test in test.parquet"),
        (["a.parquet", "testmini/b.parquet"], "several splits (no split in a.parquet, test in b.parquet"),
        ([".cache/x.parquet", "notes.txt"], "no file that ends with .parquet"),
    ],
)
def test_folders_that_cannot_be_meant(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError) as error:
        find_files(str(tmp_path), (".parquet",))
    assert message in str(error.value)


@pytest.mark.parametrize("names", [["latest.parquet", "training.parquet"], ["dev-0.parquet", "val-1.parquet"]])
def test_folders_of_one_split(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert len(find_files(str(tmp_path), (".parquet",))) == 2


def test_files_of_equal_names_have_different_keys() -> None:
    paths = [Path("a/0.x.parquet"), Path("b/0_x.parquet"), Path("c/0.x.parquet"), Path("d/1.parquet")]
    prefixes = key_prefixes(paths)
    assert len(set(prefixes.values())) == 4 and not any("." in prefix for prefix in prefixes.values())


# ---------------------------------------------------------------- validation
VALID = {"problem": "How many?", "answer": "3", "images": ["a.png"]}


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"images": ["cut.png"]}, "unreadable_image"),
        ({"images": ["text.png"]}, "unreadable_image"),
        ({"images": ["empty.png"]}, "unreadable_image"),
        ({"images": [7]}, "unreadable_image"),
        ({"answer": " "}, "empty_answer"),
        ({"answer": None}, "empty_answer"),
        ({"problem": "<image> or <image>?"}, "placeholders"),
        ({"problem": ""}, "field"),
        ({"problem": None}, "field"),
        ({"choices": "AB"}, "field"),
        ({"metadata": "text"}, "field"),
        ({"answer": ["3", "4"]}, "field"),
        ({"problem": "\ud800"}, "field"),
        ({"key": "a.b"}, "field"),
        ({"key": "../a"}, "field"),
        ({"response": "3"}, "response"),
        ({"problem": "How many?"}, "duplicate"),
        ({"key": "first"}, "repeated_key"),
    ],
)
def test_what_is_left_out(tool: ModuleType, tmp_path: Path, change: dict[str, Any], kind: str) -> None:
    whole = encoded(picture(1))
    images = {"a.png": whole, "cut.png": whole[: len(whole) // 2], "text.png": b"<svg/>", "empty.png": b""}
    wrong = {**VALID, "problem": "Another?", **change}
    rows = [{**VALID, "key": "first"}, wrong, {**VALID, "problem": "last"}]
    out = run_jsonl(tool, tmp_path, rows, images)
    assert [sample.problem for sample in samples(out)] == ["How many?", "last"]
    (problem,) = problems(out)
    assert problem["kind"] == kind in PROBLEM_KINDS and problem["where"].endswith("data.jsonl, line 2")
    assert json.loads((out / "train.report.json").read_text())["left_out"] == {kind: 1}


def test_duplicates_can_be_kept(tool: ModuleType, tmp_path: Path) -> None:
    """What asks, shows or answers anything else is no duplicate; source and metadata make no difference."""
    images = {"a.png": encoded(picture(1)), "same.png": encoded(picture(1)), "b.png": encoded(picture(2))}
    changes = [
        {},
        {"source": "s", "images": ["same.png"]},
        {"images": ["b.png"]},
        {"answer": "4"},
        {"choices": ["3", "4"]},
    ]
    rows = [{**VALID, **change, "n": number} for number, change in enumerate(changes)]
    out = run_jsonl(tool, tmp_path, rows, images)
    assert [sample.metadata["n"] for sample in samples(out)] == [0, 2, 3, 4]
    run(tool, "--input", tmp_path / "in", "--format", "jsonl", "--out", tmp_path / "all", "--keep-duplicates")
    assert len(samples(tmp_path / "all")) == 5 and problems(tmp_path / "all") == []


def test_nothing_left_is_an_error(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit):
            run_jsonl(tool, tmp_path, [{**VALID, "answer": ""}], {"a.png": encoded(picture(1))})
        assert "no sample is left of 1" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.problems.jsonl"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "PPM"])
def test_mutated_images_are_left_out_or_can_be_read(kind: str) -> None:
    """Never another error; and what is taken, the reader of shards decodes to the size that the index says."""
    random = np.random.default_rng(0)
    whole = np.frombuffer(encoded(picture(1, (31, 24)), kind), dtype=np.uint8)
    taken = 0
    for _ in range(150):
        damaged = whole.copy()
        num = random.integers(0, 4)
        damaged[random.integers(0, len(whole), num)] = random.integers(0, 256, num)
        data = damaged.tobytes()[: random.integers(1, 2 * len(whole))]
        sample = build_sample(RawSample("w", "k", {"problem": "?", "answer": "1"}, (data,)), NoRules())
        if isinstance(sample, Problem):
            assert sample.kind == "unreadable_image"
            continue
        (_, stored), (_, text) = sample.members
        taken += 1
        assert tuple(image.size for image in decode_sample("k", text, [stored], "w").images) == sample.image_sizes
    assert 0 < taken < 150


class NoRules:
    max_prompt_tokens: int | None = None
    tokenizer = ""

    def prompt_tokens(self, question: Question) -> None:
        return None

    def boxed_answer(self, template: str, response: str) -> None:
        return None


@pytest.mark.parametrize(
    "problem, num_images, expected",
    [
        ("<image>\nWhich?", 1, "Which?"),
        (" <image> <image>Which?", 2, "Which?"),
        ("Is <image> like <image>?", 2, "Is [image 1] like [image 2]?"),
        ("<image> vs. <image>?", 2, "[image 1] vs. [image 2]?"),
        ("<image><image>\nIs <image> like these?", 3, "[image 1][image 2]\nIs [image 3] like these?"),
        ("What does the tag <image> do?", 0, "What does the tag <image> do?"),
        ("Which?", 3, "Which?"),
    ],
)
def test_placeholders_leave_the_text(problem: str, num_images: int, expected: str) -> None:
    images = tuple(encoded(picture(i)) for i in range(num_images))
    sample = build_sample(RawSample("w", "k", {"problem": problem, "answer": "1"}, images), NoRules())
    assert not isinstance(sample, Problem)
    assert json.loads(dict(sample.members)["json"])["problem"] == expected


def test_lengths_are_those_of_transformers(tool: ModuleType, tmp_path: Path, tiny_model_dir: str) -> None:
    """Counted by the chat template and the image processor themselves; the longest allowed is still taken."""
    texts = ["How many?", "How many digits are there?" * 3, "x"]
    sizes = [(60, 40), (100, 30), (33, 90)]
    images = {f"{i}.png": encoded(picture(i, size)) for i, size in enumerate(sizes)}
    rows = [{"problem": text, "answer": "1", "images": [f"{i}.png"]} for i, text in enumerate(texts)]
    rows.append({"problem": "wide", "answer": "1", "images": ["wide.png"]})
    images["wide.png"] = encoded(picture(0, (402, 2)))
    rows.append({"problem": "told", "response": REASONED, "description": "three"})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    processor = AutoImageProcessor.from_pretrained(tiny_model_dir)

    def text_tokens(text: str, num_images: int) -> int:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        return len(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])

    short = [text_tokens(FIRST.user_text(text), 1) for text in texts]
    grids = [processor(images=[picture(i, size)])["image_grid_thw"][0] for i, size in enumerate(sizes)]
    full = [n - 1 + int(grid.prod()) // processor.merge_size**2 for n, grid in zip(short, grids, strict=True)]
    told = text_tokens(CAPTION_REASONER.user_text("told", 0, "three"), 0)
    limit = sorted(full)[1]
    assert told <= limit < max(full)
    out = run_jsonl(tool, tmp_path, rows, images, "--model", tiny_model_dir, "--max-prompt-tokens", limit)
    index = read_index(index_path(out / "train-00000.tar"))
    kept = [i for i in range(3) if full[i] <= limit]
    assert [sample.text_tokens for sample in index.samples] == [short[i] for i in kept] + [told]
    assert [sample.image_sizes for sample in index.samples] == [(sizes[i],) for i in kept] + [()]
    assert index.tokenizer == tiny_model_dir
    assert [problem["kind"] for problem in problems(out)] == ["too_long", "image_size"]
    assert f"has {max(full)} tokens" in problems(out)[0]["reason"]
    few = ("--model", tiny_model_dir, "--max-prompt-tokens", max(short), "--max-pixels", 28 * 28)
    out = run_jsonl(tool, tmp_path / "few", rows, images, *few)  # each image is a token then
    assert len(read_index(index_path(out / "train-00000.tar")).samples) == 4


# ---------------------------------------------------------------- shards
def test_shards_are_full_plain_tars(tool: ModuleType, tmp_path: Path) -> None:
    """Sizes by bytes; read by tar, by the plain library and by our reader, which agrees about the fingerprint."""
    limit = 40_000
    source, out = many(tmp_path / "in"), tmp_path / "out"
    long_key = {"key": "größe/" + "k" * 150, "problem": "long", "answer": "1"}
    with (source / "data.jsonl").open("a") as file:
        file.write(json.dumps(long_key) + "\n")
    run(tool, "--input", source, "--format", "jsonl", "--out", out, "--max-shard-mb", limit / 1e6)
    paths = sorted(out.glob("*.tar"))
    sizes = [path.stat().st_size for path in paths]
    assert len(paths) > 5 and max(sizes) <= limit
    indices = [read_index(index_path(path)) for path in paths]
    for size, following in zip(sizes, indices[1:], strict=False):  # the next sample would not have fitted
        first = following.samples[0]
        assert size + sum(512 + n + -n % 512 for n in first.sizes) > limit
    listed = subprocess.run(["tar", "-tf", paths[0]], capture_output=True, text=True, check=True).stdout.split()
    samples_0 = indices[0].samples
    assert listed == [f"{sample.key}.{kind}" for sample in samples_0 for kind in sample.extensions]
    plain = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False))
    ours = samples(out)
    assert [sample["__key__"] for sample in plain] == [sample.key for sample in ours]
    assert len(ours) == 301 and ours[-1].key == long_key["key"]
    for theirs, sample in zip(plain, ours, strict=True):
        assert json.loads(theirs["json"])["problem"] == sample.problem
        shown = [Image.open(io.BytesIO(theirs["0.png"]))] if sample.images else []
        assert pixels(shown) == pixels(sample.images)
    report = json.loads((out / "train.report.json").read_text())
    assert report["fingerprint"] == dataset(out).fingerprint and report["num_samples"] == 301
    for shard in report["shards"]:
        assert hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]


def test_a_sample_larger_than_a_shard_has_its_own(tool: ModuleType, tmp_path: Path) -> None:
    images = {f"{i}.png": encoded(picture(i, (90, 90) if i == 1 else (5, 5))) for i in range(3)}
    rows = [{"problem": f"q{i}", "answer": "1", "images": [f"{i}.png"]} for i in range(3)]
    out = run_jsonl(tool, tmp_path, rows, images, "--max-shard-mb", 0.01)
    assert [len(read_index(index_path(path)).samples) for path in sorted(out.glob("*.tar"))] == [1, 1, 1]
