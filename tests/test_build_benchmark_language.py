"""tools/build_benchmark.py: the sets without images, and what holds for all sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_sr1.data.benchmarks import BENCHMARKS, open_benchmark
from megatron_sr1.data.index import index_path, read_index
from tests.benchmark_cases import (
    LETTER,
    build,
    graded,
    left_out,
    load_tool,
    write_json,
    write_parquet,
)


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


# ---------------------------------------------------------------- text only
def test_gsm8k(tool: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"question": "How many eggs?", "answer": "She has 3 + 4 = <<3+4=7>>7.\n#### 7"},
        {"question": "Profit in <image> tags?", "answer": "A\n#### 70,000"},
        {"question": "Change?", "answer": "B\n#### -3.5"},
        {"question": "Lost?", "answer": "no end"},
    ]
    write_parquet(tmp_path / "in/main/test-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "in/main/train-00000-of-00001.parquet", rows[:1])
    write_parquet(tmp_path / "in/socratic/test-00000-of-00001.parquet", rows[:1])
    found = build(tool, "gsm8k", tmp_path / "in", tmp_path / "out")
    assert [sample.answer for sample in found] == ["7", "70000", "-3.5"]
    assert found[1].problem == "Profit in <image> tags?"  # text like any other
    assert {(sample.source, sample.images) for sample in found} == {("gsm8k", ())}
    graded(found[1], ["70,000", r"\$70{,}000", "70000.00"], ["70", "7000"])
    graded(found[2], ["-3.5", r"-\frac{7}{2}"], ["3.5"])
    assert left_out(tmp_path / "out", "gsm8k")[0][:2] == ("test-00000-of-00001.parquet, row 3", "empty_answer")
    lines = write_json(tmp_path / "grade-school-math/test.jsonl", rows[:3])
    assert [sample.problem for sample in build(tool, "gsm8k", lines, tmp_path / "lines")] == [x.problem for x in found]


def test_math_500(tool: ModuleType, tmp_path: Path) -> None:
    row = {"problem": "Convert $(0,3)$ to polar.", "solution": "...", "subject": "Precalculus", "level": 2}
    row |= {"answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "unique_id": "test/precalculus/807.json"}
    other = {**row, "problem": "[asy]draw();[/asy] What?", "answer": "x^2 + 1", "unique_id": "test/algebra/1.json"}
    write_json(tmp_path / "in/test.jsonl", [row, other])
    polar, plain = build(tool, "math-500", tmp_path / "in", tmp_path / "out")
    assert (polar.key, polar.source) == ("math-500/test/precalculus/807", "math-500/Precalculus")
    assert (polar.problem, polar.metadata) == (row["problem"], {"level": 2})
    graded(polar, [r"(3, \frac{\pi}{2})", r"(3,\pi/2)"], ["3", r"(\frac{\pi}{2}, 3)"])
    graded(plain, ["1 + x^2"], ["x^2 - 1", "x"])


def test_mmlu_pro(tool: ModuleType, tmp_path: Path) -> None:
    row = {"question_id": 70, "question": "Typical regulatory bodies?", "options": ["Safe", "Fear, Jealousy", "Ç"]}
    row |= {"answer": "C", "answer_index": 2, "cot_content": "", "category": "computer science", "src": "ori_mmlu"}
    at_odds = {**row, "question_id": 71, "answer_index": 1}
    many = {**row, "question_id": 72, "options": [f"{n} J" for n in range(10)], "answer": "I", "answer_index": 8}
    write_parquet(tmp_path / "in/data/test-00000-of-00001.parquet", [row, at_odds, many])
    write_parquet(tmp_path / "in/data/validation-00000-of-00001.parquet", [{**row, "question_id": 0}])
    first, last = build(tool, "mmlu-pro", tmp_path / "in", tmp_path / "out")
    assert first.problem == f"Typical regulatory bodies?\n(A) Safe\n(B) Fear, Jealousy\n(C) Ç\n{LETTER}"
    assert (first.key, first.source) == ("mmlu-pro/70", "mmlu-pro/computer science")
    graded(first, ["C"], ["B", "Ç"])
    graded(last, ["I", "(i)"], ["J", "8 J", "1"])
    assert left_out(tmp_path / "out", "mmlu-pro")[0][1:] == ("field", "its answer C is not that of answer_index=1")


def test_supergpqa(tool: ModuleType, tmp_path: Path) -> None:
    row = {"uuid": "a8390c75", "question": "The ratio is", "options": ["A1", "all of the above", "$\\ge 2$", "4"]}
    row |= {"answer": "4", "answer_letter": "D", "discipline": "Engineering", "field": "Electronics"}
    row |= {"subfield": "Circuits", "difficulty": "middle", "is_calculation": False}
    write_json(tmp_path / "in/SuperGPQA-all.jsonl", [row, {**row, "uuid": "2", "answer_letter": "E"}])
    (found,) = build(tool, "supergpqa", tmp_path / "in", tmp_path / "out")
    assert found.problem == f"The ratio is\n(A) A1\n(B) all of the above\n(C) $\\ge 2$\n(D) 4\n{LETTER}"
    assert (found.key, found.source) == ("supergpqa/a8390c75", "supergpqa/Engineering")
    assert found.metadata["field"] == "Electronics" and found.metadata["is_calculation"] is False
    graded(found, ["D"], ["4", "A"])
    assert left_out(tmp_path / "out", "supergpqa")[0][0] == "SuperGPQA-all.jsonl, line 2"


# ---------------------------------------------------------------- all of them
@pytest.mark.parametrize(
    "names, split, found",
    [
        (["main/test-00000-of-00001.parquet", "socratic/test-00000-of-00001.parquet"], None, [0]),
        (["test/0000.parquet", "train/0000.parquet"], None, [0]),
        (["a/test.jsonl", "testmini.jsonl", "test_more.jsonl", "test.md"], None, [0]),
        (["data/test-0.parquet", "data/test-1.parquet", "test.jsonl", "test.json"], None, [0, 1]),
        ([".cache/test-0.parquet", "test-1.json"], None, [1]),
        (["train-0.parquet", "test-0.parquet"], "train", [0]),
    ],
)
def test_files_of_a_split(tmp_path: Path, names: list[str], split: str | None, found: list[int]) -> None:
    """A folder may have a name that is a pattern."""
    folder = tmp_path / "[gsm8k] (copy)"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]")
    source = open_benchmark(BENCHMARKS["gsm8k"], str(folder), split, None)
    assert source.files == tuple(folder / names[number] for number in found)


def test_prompts_are_counted_by_the_model(tool: ModuleType, tmp_path: Path, tiny_model_dir: str) -> None:
    """A literal <image> in a text without images costs what its characters cost."""
    rows = [
        {"question": question, "answer": "#### 1"} for question in ("How many?", "<image> how many?", "many " * 400)
    ]
    source = write_json(tmp_path / "test.jsonl", rows)
    more = ("--model", tiny_model_dir, "--max-prompt-tokens", 400)
    found = build(tool, "gsm8k", source, tmp_path / "out", *more)
    assert [sample.problem for sample in found] == ["How many?", "<image> how many?"]
    index = read_index(index_path(tmp_path / "out" / "gsm8k-00000.tar"))
    short, long = (sample.text_tokens for sample in index.samples)
    assert index.tokenizer == tiny_model_dir and 0 < short < long <= 400
    assert [kind for _, kind, _ in left_out(tmp_path / "out", "gsm8k")] == ["too_long"]


def test_rows_of_equal_content_count_unless_told(tool: ModuleType, tmp_path: Path) -> None:
    """Published figures count every row; the same id twice is a mistake of the copy."""
    row = {"problem": "1 + 1?", "answer": "2", "subject": "Algebra", "level": 1}
    rows = [{**row, "unique_id": f"test/algebra/{number}.json"} for number in (1, 2, 2)]
    source = write_json(tmp_path / "test.jsonl", rows)
    assert len(build(tool, "math-500", source, tmp_path / "all")) == 2
    assert [kind for _, kind, _ in left_out(tmp_path / "all", "math-500")] == ["repeated_key"]
    assert len(build(tool, "math-500", source, tmp_path / "one", "--drop-duplicates")) == 1
    assert [kind for _, kind, _ in left_out(tmp_path / "one", "math-500")] == ["duplicate"] * 2


def test_what_cannot_be_meant(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Exit status 2, and nothing that could be taken for a benchmark is left behind."""
    questions = write_parquet(tmp_path / "q/test-00000-of-00001.parquet", [{"question": "x", "answer": "#### 1"}])
    withheld = {"problem": "x", "answer": "", "subject": "s", "unique_id": "1"}
    hidden = write_json(tmp_path / "hidden/test.jsonl", [withheld])
    for number, (arguments, message) in enumerate(
        (
            (
                ("mmlu-pro", questions),
                "has the columns question, answer; mmlu-pro needs question_id, options, category",
            ),
            (("mmmu", questions.parent), "holds no file of the split 'validation' of MMMU/MMMU"),
            (("gsm8k", questions, "--images", "x"), "hold their images"),
            (("gsm8k", tmp_path / "absent"), "0 files with the endings [] are there"),
            (("gsm8k", tmp_path / "[qh]*" / "*"), "2 files with the endings ['.jsonl', '.parquet']"),
            (("gsm8k", questions, "--name", "a b"), "letters, digits"),
            (("gsm8k", questions, "--workers", "-1"), "--workers 0 or more"),
            (("unknown", questions), "invalid choice: 'unknown'"),
            (("math-500", hidden), "no sample is left of 1"),
            (("visnumbench", write_json(tmp_path / "a/no.json", {"rows": []})), "holds no array of rows"),
            (("visnumbench", _cut(tmp_path / "b/cut.json")), "truncated or damaged"),
        )
    ):
        name, source, *more = map(str, arguments)
        with pytest.raises(SystemExit) as stop:
            tool.main([name, "--input", source, "--out", str(tmp_path / f"out{number}"), "--workers", "0", *more])
        assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split()), message
        assert not list((tmp_path / f"out{number}").glob("*.tar"))
    assert "not published" in (tmp_path / "out8" / "math-500.problems.jsonl").read_text()


def _cut(path: Path) -> Path:
    write_json(path, [{"id": "1"}] * 3)
    path.write_bytes(path.read_bytes()[:-9])
    return path


def test_the_table_is_whole(tool: ModuleType, capsys: pytest.CaptureFixture) -> None:
    """--help names every set; each converter says what it reads."""
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    shown = capsys.readouterr().out
    for name, benchmark in BENCHMARKS.items():
        assert f"{name} " in shown and benchmark.dataset in shown
        documented = benchmark.convert.__doc__ or ""
        for column in (one_of[0] for one_of in benchmark.columns if not one_of[0].startswith("image_")):
            assert column in documented, (name, column)
