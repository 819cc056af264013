"""tools/build_shards.py: three kinds of input, everything that is left out, the same bytes always, and the check."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from megatron_sr1.data import ShardDataset, expand_shards
from megatron_sr1.data.build_journal import Journal, Record
from megatron_sr1.data.build_samples import Question, build_sample
from megatron_sr1.data.index import index_path, read_index, write_index
from megatron_sr1.data.schema import decode_sample
from megatron_sr1.data.sources import PROBLEM_KINDS, Problem, RawSample
from megatron_sr1.data.sources_files import find_files, key_prefixes
from megatron_sr1.prompts import render_caption_reasoner, render_see_think
from megatron_sr1.types import Prompt, SftSample
from tests.data_cases import encoded, noise

TOOL = Path(__file__).parents[1] / "tools" / "build_shards.py"
SEE_THINK = "<description>a dial</description><think>it shows 3</think>\\boxed{3}"
REASONED = "<think>the text says 3</think>\\boxed{3}"
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("build_shards_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def picture(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return noise(seed, size)


def write_jsonl(
    folder: Path, rows: Sequence[Mapping[str, Any] | str], images: Mapping[str, bytes] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (images or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def many(folder: Path, num: int = 300) -> Path:
    """Questions with images of different sizes, and some without."""
    images = {f"images/{i}.png": encoded(picture(i, (20 + i % 13, 24))) for i in range(num) if i % 5}
    rows = [
        {"problem": f"Frage {i}?", "answer": str(i), "images": [f"images/{i}.png"] * bool(i % 5)} for i in range(num)
    ]
    return write_jsonl(folder, rows, images)


def run(tool: ModuleType, *arguments: object) -> None:
    tool.main([str(argument) for argument in (*arguments, "--workers", 0)])


def run_jsonl(
    tool: ModuleType, tmp_path: Path, rows: Sequence[Any], images: Mapping[str, bytes], *more: object
) -> Path:
    source, out = write_jsonl(tmp_path / "in", rows, images), tmp_path / "out"
    run(tool, "--input", source, "--format", "jsonl", "--out", out, *more)
    return out


def dataset(out: Path) -> ShardDataset:
    return ShardDataset(expand_shards([str(out / "*.tar")], "out"))


def samples(out: Path) -> list[Prompt | SftSample]:
    found = dataset(out)
    return [found.read(i) for i in range(len(found))]


def problems(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "train.problems.jsonl").read_text().splitlines()]


def files_of(folder: Path) -> dict[str, str]:
    """Hashes of everything, also of hidden files and folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pixels(images: Sequence[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


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
    assert [(sample.problem, sample.answer) for sample in found] == [(f"How many in {i}?", str(i)) for i in range(7)]
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
        {"problem": "none", "answer": 2.5},
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
    from megatron_sr1.data import sources_webdataset
    from megatron_sr1.data.sources import Columns

    monkeypatch.setattr(sources_webdataset, "BYTES_PER_CHUNK", 5000)
    keys = [f"{'long' * (40 * (i % 3))}{i:04d}" for i in range(40)]  # some need a pax header
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for key in keys:
            data = json.dumps({"problem": key, "answer": "1"}).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = sources_webdataset.WebDatasetSource(str(tmp_path / "a.tar"), Columns())
    chunks = list(source.chunks())
    assert len(chunks) > 5 and sum(chunk.num_rows for chunk in chunks) == 40
    assert [sample.key for chunk in chunks for sample in source.read(chunk)] == keys
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"cut\.tar.*truncated or damaged"):
        list(sources_webdataset.WebDatasetSource(str(tmp_path / "cut.tar"), Columns()).chunks())


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
        (["train-0.parquet", "test-0.parquet"], "several splits (test, train)"),
        (["train/0.parquet", "validation/0.parquet"], "several splits (train, validation)"),
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
        ({"images": [], "problem": "<image>?"}, "placeholders"),
        ({"problem": ""}, "field"),
        ({"problem": None}, "field"),
        ({"choices": "AB"}, "field"),
        ({"metadata": "text"}, "field"),
        ({"answer": ["3"]}, "field"),
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
    changes = [{}, {"source": "s", "images": ["same.png"]}, {"images": ["b.png"]}, {"answer": "4"}, {"choices": ["3"]}]
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
        ("<image>Is it like <image>?", 2, "Is it like [image 2]?"),
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

    short = [text_tokens(render_see_think(text), 1) for text in texts]
    grids = [processor(images=[picture(i, size)])["image_grid_thw"][0] for i, size in enumerate(sizes)]
    full = [n - 1 + int(grid.prod()) // processor.merge_size**2 for n, grid in zip(short, grids, strict=True)]
    told = text_tokens(render_caption_reasoner("three", "told"), 0)
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


def command(source: Path, out: Path, workers: int) -> list[str]:
    options = ["--format", "jsonl", "--max-shard-mb", "0.04", "--workers", str(workers)]
    return [sys.executable, str(TOOL), "--input", str(source), "--out", str(out), *options]


def test_killed_and_run_again_gives_the_same_bytes(tool: ModuleType, tmp_path: Path) -> None:
    """SIGKILL after some shards, at another number of workers each time; then the whole must be as without."""
    source = many(tmp_path / "in", 1200)
    with (source / "data.jsonl").open("a") as file:  # repetitions of samples in shards that are long finished
        file.write(json.dumps({"problem": "Frage 0?", "answer": "0"}) + "\n{broken\n")
    out, untouched = tmp_path / "out", tmp_path / "untouched"
    work = out / ".train.build"
    done: list[int] = []
    for workers in (2, 0):
        process = subprocess.Popen(command(source, out, workers), start_new_session=True, stdout=subprocess.DEVNULL)
        before = len(list(work.glob("[0-9]*.json")))
        while len(list(work.glob("[0-9]*.json"))) < before + 4:
            assert process.poll() is None, "it was too quick to be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done.append(len(list(work.glob("[0-9]*.json"))))
        assert not list(out.glob("*.tar"))  # nothing half built can be taken for a data set
        deadline = time.monotonic() + 20  # workers of a killed parent end by themselves
        while _session_is_alive(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("*.tar") if int(path.stem[-5:]) < done[-1]}
    subprocess.run(command(source, out, 2), check=True, stdout=subprocess.DEVNULL)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished  # not written again
    run(tool, "--input", source, "--format", "jsonl", "--out", untouched, "--max-shard-mb", 0.04)
    assert files_of(out) == files_of(untouched)
    assert done[0] < done[1] < len(list(out.glob("*.tar")))
    assert [problem["kind"] for problem in problems(out)] == ["duplicate", "unreadable_sample"]


def _session_is_alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def _publish_one(journal: Journal, records: list[Record]) -> None:
    for path in (journal.folder / records[0].shard, index_path(journal.folder / records[0].shard)):
        path.rename(journal.folder.parent / path.name)
    raise KeyboardInterrupt


def test_what_a_second_run_does(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = many(tmp_path / "in", 40), tmp_path / "out"
    call = ("--input", source, "--format", "jsonl", "--out", out)
    run(tool, *call)
    before = files_of(out)
    run(tool, *call)
    assert "nothing to do" in capsys.readouterr().out and files_of(out) == before
    with pytest.raises(SystemExit):
        run(tool, *call, "--max-shard-mb", 1)
    assert "shards train-*.tar of another build" in capsys.readouterr().err
    # as if killed while the first shards are being published
    monkeypatch.setattr(Journal, "publish", _publish_one)
    small = (*call, "--name", "other", "--max-shard-mb", 0.01)
    with pytest.raises(KeyboardInterrupt):
        run(tool, *small)
    assert (out / "other-00000.tar").is_file() and not (out / "other.report.json").exists()
    monkeypatch.undo()
    run(tool, *small)
    run(tool, *small, "--out", tmp_path / "at once")
    assert {name: sha for name, sha in files_of(out).items() if "other" in name} == files_of(tmp_path / "at once")
    run(tool, *call, "--name", "more")
    assert files_of(out).items() >= before.items() and (out / "more-00000.tar").is_file()
    (out / ".third.build").mkdir()
    for name in ("plan.json", "00000.json"):
        (out / ".third.build" / name).write_text("{}")
    with pytest.raises(SystemExit):
        run(tool, *call, "--name", "third")
    assert "unfinished build of another input" in capsys.readouterr().err


def test_wrong_arguments(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ((), "--input and --format are needed"),
        (("--input", tmp_path, "--format", "jsonl"), "no file that ends with .jsonl"),
        (("--input", tmp_path, "--format", "jsonl", "--name", "a/b"), "letters, digits"),
        (("--input", tmp_path, "--format", "jsonl", "--max-shard-mb", 0), "above 0"),
        (("--input", tmp_path, "--format", "jsonl", "--rename", "x"), "COLUMN=FIELD"),
        (("--input", tmp_path, "--format", "webdataset", "--images", "x"), "--images belongs to"),
        (("--check",), "holds no *.tar"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(tool, "--out", tmp_path / "out", *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------- --check
@pytest.fixture(scope="module")
def built(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    run(tool, "--input", many(folder / "in", 12), "--format", "jsonl", "--out", folder / "out", "--max-shard-mb", 0.02)
    return folder / "out"


def check(tool: ModuleType, out: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    capsys.readouterr()
    try:
        run(tool, "--check", "--out", out)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_check_finds_every_flipped_byte(tool: ModuleType, built: Path, capsys: pytest.CaptureFixture) -> None:
    assert check(tool, built, capsys)[0] == 0
    shard = built / "train-00001.tar"
    whole, index = shard.read_bytes(), read_index(index_path(shard))
    sample = index.samples[0]
    places = np.random.default_rng(0).integers(0, len(whole), 40).tolist()
    for place in (0, 300, sample.offsets[0], sample.offsets[0] + 60, sample.offsets[-1] + 3, len(whole) - 1, *places):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        status, text = check(tool, built, capsys)
        assert status == 1 and "train-00001.tar" in text, place
        if place == sample.offsets[0] + 60:
            assert f"sample {sample.key!r}: its checksum is not that of the index" in text
    shard.write_bytes(whole)
    written = index_path(shard).read_bytes()
    columns = written.index(b"\n") + 1
    for place in np.random.default_rng(1).integers(columns, len(written) - 1, 10).tolist():
        index_path(shard).write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        assert check(tool, built, capsys)[0] == 1, place
    index_path(shard).write_bytes(written)
    assert check(tool, built, capsys)[0] == 0


def test_check_finds_what_is_missing(tool: ModuleType, built: Path, capsys: pytest.CaptureFixture) -> None:
    shard = built / "train-00001.tar"
    index = index_path(shard)
    for path, message in ((shard, "the shard is missing"), (index, "the index cannot be read")):
        whole = path.read_bytes()
        path.unlink()
        status, text = check(tool, built, capsys)
        assert status == 1 and message in text
        path.write_bytes(whole)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    status, text = check(tool, built, capsys)
    assert status == 1 and "train-00001.tar" in text
    shard.write_bytes(whole)
    known = read_index(index)
    wrong = replace(known.samples[0], image_sizes=((1, 1),))
    write_index(shard, replace(known, samples=(wrong, *known.samples[1:])))
    assert "image sizes are not those of the index" in check(tool, built, capsys)[1]
    write_index(shard, replace(known, samples=known.samples[1:]))
    assert f"sample {wrong.key!r}: it is not in the index" in check(tool, built, capsys)[1]
