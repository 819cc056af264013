"""Rows as people write them: images under other names, numbers that are none, conversations, marks."""

from __future__ import annotations

import base64
import datetime
import importlib.util
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_sr1.data.choices import ANSWER_WITH_LETTER
from megatron_sr1.data.json_values import as_json, number_text
from megatron_sr1.data.schema import decode_sample
from megatron_sr1.data.sources.files import find_files
from megatron_sr1.types import Prompt, SftSample
from tests.build_cases import ASKED, build, load_tool, problems, run, run_jsonl, samples
from tests.data_cases import encoded, noise, png

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


def levels(sample: Prompt | SftSample | None) -> list[int]:
    assert isinstance(sample, Prompt)
    return [image.getpixel((0, 0))[0] for image in sample.images]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


# ---------------------------------------------------------------- images
@pytest.mark.parametrize(
    "columns",
    [
        {"image_path": "r.png"},
        {"img": "r.png"},
        {"Image": "r.png"},
        {"image_file": "r"},
        {"image_url": "https://host/r?x=1"},
        {"image_0": "r.png", "image_1": "g.png"},
        {"images_path": ["r.png"]},
        {"file_name": "deep/r.JPG"},
        {"picture": {"bytes": None, "path": "r.png"}},
        {"pixels": "data:image/png;base64,AAAA"},
        {"image": "r.png", "image_2": "g.png"},
        {"images": ["r.png", "g.png"], "image": "r.png"},
        {"video": "r.mp4"},
        {"image": "r.png", "second_image": "g.png"},
        {"figure": {"url": "https://host/r.png?x=1"}},
        {"file": "my r.png"},
        {"screenshot": "iVBORw0KGgo" + "A" * 80},
    ],
)
def test_what_looks_like_an_image_is_never_metadata(tool: ModuleType, tmp_path: Path, columns: dict[str, Any]) -> None:
    sample, problem = build(tool, tmp_path, {**ASKED, **columns})
    assert sample is None and problem["kind"] == ("image_columns")
    assert next(reversed(columns)) in problem["reason"] or "image_0" in problem["reason"]


@pytest.mark.parametrize(
    "columns, metadata",
    [
        ({"image_id": 7, "image_width": 3, "url": "https://host/page.html"}, {"image_id": 7, "image_width": 3}),
        ({"image": "r.png", "image_path": "old/r.png"}, {"image_path": "old/r.png"}),
        ({"image": [], "image_path": "", "img": None}, {"image_path": ""}),
        ({"metadata": {"img": "r.png"}}, {"img": "r.png"}),
    ],
)
def test_what_is_no_image_is_metadata(
    tool: ModuleType, tmp_path: Path, columns: dict[str, Any], metadata: dict[str, Any]
) -> None:
    sample, _ = build(tool, tmp_path, {**ASKED, **columns})
    assert isinstance(sample, Prompt) and metadata.items() <= sample.metadata.items()


@pytest.mark.parametrize(
    "columns, rename, expected",
    [
        ({"image_1": "g.png", "image_0": "r.png"}, ["image_0=images", "image_1=images"], [1, 2]),
        ({"images": ["r.png"], "image": "g.png"}, ["image=images"], [1, 2]),
        ({"img": "g.png"}, ["img=images"], [2]),
        ({"img": "g.png"}, ["img="], []),
        ({"img": "g.png"}, ["img=img"], []),
    ],
)
def test_images_are_what_the_user_says(
    tool: ModuleType, tmp_path: Path, columns: dict[str, Any], rename: list[str], expected: list[int]
) -> None:
    """Several columns are joined, in the order in which they are named."""
    sample, _ = build(tool, tmp_path, {**ASKED, **columns}, "--rename", *rename)
    assert levels(sample) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_column_that_no_row_has_cannot_be_renamed(
    tool: ModuleType, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / f"a{suffix}").write_text(json.dumps([ASKED] if suffix == ".json" else ASKED))
    with pytest.raises(SystemExit):
        out = ("--out", tmp_path / "out", "--rename", "imgae=images")
        run(tool, "--input", tmp_path / f"a{suffix}", "--format", suffix[1:], *out)
    assert "no row has the column 'imgae' that --rename names" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_one_kind_are_read_however_they_are_spelled(tool: ModuleType, tmp_path: Path) -> None:
    """Compressed ones among them are not passed over."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("a.jsonl", "b.JSONL")):
        (folder / name).write_text(json.dumps({"problem": f"{number}?", "answer": "1"}))
    run(tool, "--input", folder, "--format", "jsonl", "--out", tmp_path / "out")
    assert [sample.problem for sample in samples(tmp_path / "out") if isinstance(sample, Prompt)] == ["0?", "1?"]
    (folder / "c.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 compressed files beside what is read, c\.jsonl\.gz the first"):
        find_files(str(folder), (".jsonl",))
    assert len(find_files(str(folder / "*.jsonl"), (".jsonl",))) == 1


def test_two_columns_of_one_name_are_named(tool: ModuleType, tmp_path: Path) -> None:
    _, problem = build(tool, tmp_path, {**ASKED, "question": "And?"}, "--rename", "question=problem")
    assert "problem is given twice" in problem["reason"]
    _, problem = build(tool, tmp_path / "b", {**ASKED, "n": 1, "metadata": {"n": 2}})
    assert "'n' is a column and stands in metadata too" in problem["reason"]
    _, problem = build(tool, tmp_path / "c", '{"problem": "a?", "problem": "b?", "answer": "1"}')
    assert "two values of 'problem'" in problem["reason"]
    with pytest.raises(SystemExit):
        build(tool, tmp_path / "d", ASKED, "--rename", "a=problem", "a=answer")


def test_rows_of_other_columns_say_which_they_have(tool: ModuleType, tmp_path: Path) -> None:
    _, problem = build(tool, tmp_path, {"question": "Which?", "solution": "3"})
    assert (problem["kind"], "question, solution" in problem["reason"]) == ("field", True)
    _, problem = build(tool, tmp_path / "b", {"problem": "Which?", "correct_choice_idx": 3})
    assert problem["kind"] == "empty_answer" and "correct_choice_idx; name it with --rename" in problem["reason"]


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize("answer", ["NaN", "Infinity", "-Infinity", "1e999", "null", '""', '"nan"'])
def test_a_number_that_is_none_is_an_empty_answer(tool: ModuleType, tmp_path: Path, answer: str) -> None:
    _, problem = build(tool, tmp_path, f'{{"problem": "Which?", "answer": {answer}}}')
    assert problem["kind"] == "empty_answer"


@pytest.mark.parametrize(
    "number, text",
    [
        (3, "3"),
        (3.0, "3"),
        (-0.0, "0"),
        (0.3, "0.3"),
        (1e-7, "0.0000001"),
        (1e22, "1e+22"),
        (2**70, str(2**70)),
        (1e15 + 0.5, "1000000000000000.5"),
        (float("inf"), ""),
        (Decimal("3.50"), "3.50"),
        (Decimal("NaN"), ""),
    ],
)
def test_numbers_as_text(number: float | Decimal, text: str) -> None:
    assert number_text(number) == text


def test_metadata_are_json_whatever_they_were(tool: ModuleType, tmp_path: Path) -> None:
    """NaN in metadata, in a column of its own, and in a tar that is read directly: null."""
    row = '{"problem": "q", "answer": "1", "nan": NaN, "deep": [NaN, {"x": Infinity}], "metadata": {"a": NaN, "b": 1}}'
    sample, _ = build(tool, tmp_path, row)
    assert isinstance(sample, Prompt)
    assert sample.metadata == {"deep": [None, {"x": None}], "a": None, "b": 1}
    (stored,) = (tmp_path / "out").glob("*.tar")
    assert b"NaN" not in stored.read_bytes() and b"Infinity" not in stored.read_bytes()
    read = decode_sample("k", b'{"problem": "q", "answer": "1", "metadata": {"a": NaN}}', (), "here")
    assert isinstance(read, Prompt) and read.metadata == {"a": None}
    made = as_json({1: Decimal("0.10"), "d": datetime.date(2024, 2, 29), "t": (float("nan"), True)})
    assert made == {"1": "0.10", "d": "2024-02-29", "t": [None, True]}


@needs_pyarrow
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_other_types(tool: ModuleType, tmp_path: Path, suffix: str) -> None:
    """float32 and float16 keep their shortest text, decimals their digits, a NaN is no answer; also in metadata."""
    import pyarrow
    import pyarrow.parquet

    def build(kind: pyarrow.DataType, values: Sequence[object]) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        more = pyarrow.array([{"v": [value]} for value in values], pyarrow.struct([("v", pyarrow.list_(kind))]))
        columns = {
            "problem": [f"q{i}" for i in range(len(values))],
            "answer": pyarrow.array(values, kind),
            "more": more,
        }
        table = pyarrow.table(columns)
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, folder / "a.parquet")
        else:
            with pyarrow.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
                writer.write_table(table)
        run(tool, "--input", folder, "--format", "parquet", "--out", folder / "out")
        found = [sample for sample in samples(folder / "out") if isinstance(sample, Prompt)]
        assert len(found) + len(problems(folder / "out")) == len(values)
        assert [
            number_text(n) if isinstance(n := sample.metadata["more"]["v"][0], float) else str(n) for sample in found
        ] == [sample.answer for sample in found]
        return [sample.answer for sample in found]

    nan, inf = float("nan"), float("inf")
    assert build(pyarrow.float32(), [0.3, 2.5, nan, inf, -inf, None, 1e-3, 7.0]) == ["0.3", "2.5", "0.001", "7"]
    if suffix == ".arrow":
        assert build(pyarrow.float64(), [0.1 + 0.2]) == ["0.30000000000000004"]
        assert build(pyarrow.decimal128(9, 2), [Decimal("3.50"), Decimal("12")]) == ["3.50", "12.00"]
        assert build(pyarrow.date32(), [datetime.date(2024, 2, 29)]) == ["2024-02-29"]


@needs_pyarrow
def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from megatron_sr1.data.sources.columns import Columns
    from megatron_sr1.data.sources.parquet import ParquetSource

    columns = [pyarrow.array(["q"]), pyarrow.array(["a"]), pyarrow.array(["c"])]
    table = pyarrow.Table.from_arrays(columns, ["problem", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has two columns 'answer'"):
        list(ParquetSource(str(tmp_path), Columns()).chunks())


@needs_pyarrow
def test_half_precision(tmp_path: Path) -> None:
    import numpy as np
    import pyarrow

    from megatron_sr1.data.sources.columns import Columns
    from megatron_sr1.data.sources.parquet import ParquetSource

    table = pyarrow.table({"problem": ["q"], "answer": pyarrow.array([np.float16(0.1)], pyarrow.float16())})
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = ParquetSource(str(tmp_path), Columns())
    (sample,) = [sample for chunk in source.chunks() for sample in source.read(chunk)]
    assert getattr(sample, "fields")["answer"] == "0.1"  # noqa: B009


# ---------------------------------------------------------------- marks
def test_marks_in_the_options_name_their_image(tool: ModuleType, tmp_path: Path) -> None:
    row = {"problem": "<image>\nWhich?", "answer": 0, "choices": ["<image>", "none"], "images": ["r.png", "g.png"]}
    sample, _ = build(tool, tmp_path, row)
    assert isinstance(sample, Prompt) and sample.choices == ("[image 2]", "none")
    assert sample.problem == f"[image 1]\nWhich?\n(A) [image 2]\n(B) none\n{ANSWER_WITH_LETTER}"


@pytest.mark.parametrize(
    ("problem", "num_images", "read"),
    [
        ("<image>\nWhich?", 1, "Which?"),
        ("<image> or <image>?", 2, "[image 1] or [image 2]?"),
        ("What is <image>?", 0, "What is <image>?"),
    ],
)
def test_marks_are_placed_in_shards_that_are_read_directly_too(problem: str, num_images: int, read: str) -> None:
    text = json.dumps({"problem": problem, "answer": "1"}).encode()
    sample = decode_sample("k", text, [png(1)] * num_images, "k")
    assert isinstance(sample, Prompt) and sample.problem == read
    with pytest.raises(ValueError, match=r"k: . times <image> in the text, but 3 images"):
        decode_sample("k", text, [png(1)] * 3, "k")


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "<image>\nWhich?"},
        {"problem": "<image>Which?", "image": None},
        {"problem": "<image> Which?", "images": []},
        {"conversations": [{"from": "human", "value": "Which <image>?"}]},
    ],
)
def test_a_question_whose_image_is_missing_is_left_out(tool: ModuleType, tmp_path: Path, row: dict[str, Any]) -> None:
    """It is no question without an image: it would be asked blindly."""
    sample, problem = build(tool, tmp_path, {"answer": "1", **row})
    assert sample is None and problem["kind"] == "placeholders"


# ---------------------------------------------------------------- conversations
HUMAN, GPT = {"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}
USER, ASSISTANT = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    "columns",
    [
        {"id": "x", "image": "r.png", "conversations": [HUMAN, GPT]},
        {"images": ["r.png"], "messages": [{**USER, "content": "<image>Which?"}, ASSISTANT]},
        {
            "images": ["r.png"],
            "messages": [{**USER, "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}, ASSISTANT],
        },
        {"images": ["r.png"], "messages": [USER], "answer": "red"},
    ],
)
def test_a_conversation_of_one_question_is_a_sample(tool: ModuleType, tmp_path: Path, columns: dict[str, Any]) -> None:
    sample, _ = build(tool, tmp_path, columns)
    assert isinstance(sample, Prompt)
    assert (sample.problem, sample.answer, levels(sample)) == ("Which?", "red", [1])
    assert sample.metadata.get("id") == columns.get("id")


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"conversations": [HUMAN, GPT, HUMAN, GPT]}, "the turns user, assistant, user, assistant"),
        ({"messages": [{"role": "system", "content": "Be short."}, USER, ASSISTANT]}, "the turns system, user"),
        ({"messages": [USER, ASSISTANT], "answer": "blue"}, "answer is given twice, the second time by 'messages'"),
        ({"messages": []}, "of nobody"),
        ({"messages": "Which?"}, "must be a list of turns"),
        ({"messages": [{"text": "Which?"}]}, "has text; needed are role and content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "r.png"}]}, ASSISTANT]},
            "a part of a turn",
        ),
        ({"messages": [USER]}, "it has no answer"),
        ({"system": "Be short.", "messages": [USER, ASSISTANT]}, "'system' is said before the conversation"),
    ],
)
def test_other_conversations_are_named(tool: ModuleType, tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    sample, problem = build(tool, tmp_path, columns)
    assert sample is None and reason in problem["reason"]


def test_json_arrays_and_utf_16(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{**ASKED, "image": "r.png"}, {"conversations": [HUMAN, GPT], "image": "g.png"}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "r.png").write_bytes(png(1))
    (tmp_path / "in" / "g.png").write_bytes(png(2))
    (tmp_path / "in" / "a.json").write_text(json.dumps(rows, indent=1))
    for name, encoding in (("u.jsonl", "utf-16"), ("v.jsonl", "utf-16-le")):
        (tmp_path / name).write_bytes(json.dumps(ASKED).encode(encoding))
    for path, message in (
        ("in/a.json", "Give --format json"),
        ("u.jsonl", "UTF-16"),
        ("v.jsonl", "u?v.jsonl: it is no"),
    ):
        with pytest.raises(SystemExit):
            run(tool, "--input", tmp_path / path, "--format", "jsonl", "--out", tmp_path / "no")
        assert message.replace("u?", "") in capsys.readouterr().err
    run(tool, "--input", tmp_path / "in", "--format", "json", "--out", tmp_path / "out")
    assert [levels(sample) for sample in samples(tmp_path / "out")] == [[1], [2]]


def test_images_written_out_in_base64_are_decoded(tool: ModuleType, tmp_path: Path) -> None:
    """Alone, as a data URL, in a struct, over several lines; one that is damaged is named in a few words."""
    image = noise(3, (90, 70))
    formats = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
    kinds = {name: base64.b64encode(encoded(image, name)).decode() for name in formats}
    texts = [*kinds.values(), f"data:image/png;base64,{kinds['PNG']}", {"bytes": kinds["PNG"]}]
    texts.append("\n".join(kinds["PNG"][start : start + 76] for start in range(0, len(kinds["PNG"]), 76)))
    rows: list[dict[str, Any]] = [
        {"problem": f"Question {number}?", "answer": "1", "images": [text]} for number, text in enumerate(texts)
    ]
    rows += [{"problem": "Damaged?", "answer": "1", "images": [kinds["PNG"] + "*"]}]
    rows += [{"problem": "A long path?", "answer": "1", "images": ["x" * 5000]}]
    out = run_jsonl(tool, tmp_path, rows, {})
    found = samples(out)
    assert len(found) == len(texts) and {sample.images[0].size for sample in found} == {(90, 70)}
    damaged, long = (problem["reason"] for problem in problems(out))
    assert "begins as an image in base64, 'iVBORw0KGgoAAAANSUhE'" in damaged
    assert "File name too long" in long and len(long) < 400
