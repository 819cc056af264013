"""tools/build_benchmark.py: POPE, AMBER and HallusionBench in the layout of their authors."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_sr1.data.benchmarks import BENCHMARKS, open_benchmark
from megatron_sr1.data.sources.source import RawSample
from megatron_sr1.data.yes_no import YesNo, yes_no_of
from megatron_sr1.types import Prompt
from tests.benchmark_cases import (
    TOOLS,
    build,
    graded,
    hashes,
    left_out,
    levels,
    load_tool,
    struct,
    write_images,
    write_json,
    write_parquet,
)

YES_OR_NO = "Answer yes or no."


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


def refused(tool: ModuleType, capsys: pytest.CaptureFixture, out: Path, *arguments: object) -> str:
    """What the command says where it ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        tool.main([*map(str, arguments), "--out", str(out), "--workers", "0"])
    assert stop.value.code == 2 and not list(out.glob("*.tar"))
    return " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------- POPE
def pope_row(number: int, category: str, answer: str, **more: Any) -> dict[str, Any]:
    row = {"id": str(number), "question_id": str(number), "question": f"Is there a cat, number {number}?"}
    row |= {"answer": answer, "image_source": "COCO_val2014_000000310196", "image": struct(number)}
    return {**row, "category": category, **more}


def test_pope_of_the_hub(tool: ModuleType, tmp_path: Path) -> None:
    """Questions are numbered from 1 in each category; the same rows lie in `Full`, a split for each category."""
    rows = [pope_row(1, "adversarial", "yes"), pope_row(2, "adversarial", "no"), pope_row(1, "popular", "no")]
    rows.append(pope_row(1, "random", "yes"))
    write_parquet(tmp_path / "hub/data/test-00000-of-00002.parquet", rows[:2])
    write_parquet(tmp_path / "hub/data/test-00001-of-00002.parquet", rows[2:])
    write_parquet(tmp_path / "hub/Full/random-00000-of-00001.parquet", rows[3:])
    found = build(tool, "pope", tmp_path / "hub", tmp_path / "out")
    keys = ["adversarial/1", "adversarial/2", "popular/1", "random/1"]
    assert [sample.key for sample in found] == [f"pope/{key}" for key in keys]
    assert [sample.source for sample in found] == [
        "pope/adversarial",
        "pope/adversarial",
        "pope/popular",
        "pope/random",
    ]
    assert [sample.answer for sample in found] == ["Yes", "No", "No", "Yes"]
    assert found[1].problem == f"Is there a cat, number 2?\n{YES_OR_NO}"
    assert found[0].metadata["image_source"] == "COCO_val2014_000000310196"
    assert [yes_no_of(sample) for sample in found] == [YesNo(positive="yes")] * 4
    assert [levels(sample) for sample in found] == [[1], [2], [1], [1]]
    graded(found[0], ["yes", "Yes.", "Yes, there is a cat."], ["no", "No, there is no cat.", "maybe", "1", "true"])
    graded(found[1], ["no", "No.", "No, there is no cat."], ["yes", "not sure", "There is none", "0", ""])
    (alone,) = build(tool, "pope", tmp_path / "hub", tmp_path / "random", "--split", "random")
    assert alone.key == "pope/random/1"
    assert left_out(tmp_path / "out", "pope") == []


def test_pope_rows_that_are_left_out(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [
        pope_row(1, "random", "yes"),
        pope_row(2, "random", "maybe"),
        pope_row(3, "common", "yes"),
        pope_row(4, "random", "no") | {"category": None},
        pope_row(5, "random", "no") | {"image": None},
        pope_row(6, "random", ""),
        pope_row(7, "random", "no", question=" "),
        pope_row(1, "random", "no"),
        pope_row(1, "Popular", "YES"),
    ]
    source = write_parquet(tmp_path / "in/test-00000-of-00001.parquet", rows, ["image"])
    found = build(tool, "pope", source, tmp_path / "out")
    assert [(sample.key, sample.answer) for sample in found] == [("pope/random/1", "Yes"), ("pope/popular/1", "Yes")]
    wanted = [
        ("field", "its answer or label 'maybe' must be yes or no"),
        ("field", "category='common' must be one of random, popular, adversarial"),
        ("field", "add it to every row"),
        ("placeholders", "it has no image in image"),
        ("empty_answer", "not published"),
        ("field", "its question or text is blank"),
        ("repeated_key", "'pope/random/1' is taken"),
    ]
    for (where, kind, reason), (row, (wanted_kind, part)) in zip(
        left_out(tmp_path / "out", "pope"), enumerate(wanted, 1), strict=True
    ):
        assert where == f"{source.name}, row {row}" and kind == wanted_kind and part in reason, reason
    bare = [{name: value for name, value in row.items() if name != "category"} for row in rows[:1]]
    bare_file = write_parquet(tmp_path / "bare/test-0.parquet", bare)
    assert "pope needs category too" in refused(tool, capsys, tmp_path / "no", "pope", "--input", bare_file)
    empty = write_json(tmp_path / "empty/test.json", [])
    assert "no sample is left of 0" in refused(tool, capsys, tmp_path / "none", "pope", "--input", empty)


def test_pope_of_its_authors(tool: ModuleType, tmp_path: Path) -> None:
    """Lines with other names; the category is in the name of their files, so it is added."""
    write_images(tmp_path / "val2014", {"COCO_1.jpg": 7})
    row = {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a cat?", "label": "no", "category": "popular"}
    source = write_json(tmp_path / "coco_pope_popular.jsonl", [row])
    (found,) = build(tool, "pope", source, tmp_path / "out", "--images", tmp_path / "val2014")
    assert (found.key, found.problem) == ("pope/popular/1", f"Is there a cat?\n{YES_OR_NO}")
    assert (found.answer, found.source, len(found.images)) == ("No", "pope/popular", 1)


# ---------------------------------------------------------------- AMBER
AMBER: Mapping[int, tuple[str, str, str]] = {  # id: type, truth, category
    1005: ("discriminative-attribute-state", "yes", "attribute/state"),
    1006: ("discriminative-attribute-number", "no", "attribute/number"),
    1007: ("discriminative-attribute-action", "yes", "attribute/action"),
    8633: ("discriminative-hallucination", "no", "existence"),
    13557: ("discriminative-relation", "yes", "relation"),
    13558: ("relation", "no", "relation"),
}


def amber_folder(folder: Path, labels: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Annotations above the queries; the queries of all kinds, and again those of each."""
    queries = [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}]
    queries += [{"id": key, "image": "AMBER_1.jpg", "query": f"Is {key} there?"} for key in AMBER]
    known = [{"id": 1, "type": "generative", "truth": ["cat"], "hallu": ["dog"]}]
    known += [{"id": key, "type": kind, "truth": truth} for key, (kind, truth, _) in AMBER.items()]
    write_json(folder / "data/annotations.json", known if labels is None else labels)
    write_json(folder / "data/relation.json", {"cat": ["dog"]})
    for name, chosen in (
        ("all", queries),
        ("discriminative", queries[1:]),
        ("discriminative-existence", queries[4:5]),
        ("generative", queries[:1]),
    ):
        write_json(folder / f"data/query/query_{name}.json", chosen)
    write_images(folder / "image", {"AMBER_1.jpg": 5})
    return folder


def check_amber(found: Sequence[Prompt]) -> None:
    assert [sample.key for sample in found] == [f"amber/{key}" for key in AMBER]
    assert [sample.source for sample in found] == [f"amber/{category}" for _, _, category in AMBER.values()]
    assert [sample.answer.lower() for sample in found] == [truth for _, truth, _ in AMBER.values()]
    assert [sample.metadata["type"] for sample in found] == [kind for kind, _, _ in AMBER.values()]
    assert [yes_no_of(sample) for sample in found] == [YesNo(positive="no")] * len(AMBER)
    assert found[3].problem == f"Is 8633 there?\n{YES_OR_NO}" and len(found[3].images) == 1
    graded(found[3], ["No", "no, it is not there"], ["Yes", "maybe"])


def test_amber_of_its_authors(tool: ModuleType, tmp_path: Path) -> None:
    """Each question once, though the folder has files of each kind too; answers come from a file of their own."""
    raw = amber_folder(tmp_path / "AMBER")
    images = ("--images", raw / "image")
    check_amber(build(tool, "amber", raw, tmp_path / "out", *images))
    assert left_out(tmp_path / "out", "amber") == []
    one = ("--split", "query_discriminative-existence.json")
    assert [sample.key for sample in build(tool, "amber", raw, tmp_path / "one", *one, *images)] == ["amber/8633"]
    whole = raw / "data/query/query_all.json"
    check_amber(build(tool, "amber", whole, tmp_path / "all", *images))
    ((where, kind, reason),) = left_out(tmp_path / "all", "amber")
    assert (where, kind) == ("query_all.json, row 0", "field") and "asks for a description" in reason


def test_amber_of_a_copy_with_answers_in_its_rows(tool: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"image": struct(5, "JPEG"), "id": key, "query": f"Is {key} there?", "type": kind, "truth": truth}
        for key, (kind, truth, _) in AMBER.items()
    ]
    source = write_parquet(tmp_path / "hub/discriminative/train-00000-of-00001.parquet", rows)
    check_amber(build(tool, "amber", source.parent, tmp_path / "out", "--split", "train"))
    bare = [{name: value for name, value in row.items() if name != "truth"} for row in rows]
    with pytest.raises(ValueError, match="amber needs truth too"):
        list(open_benchmark(BENCHMARKS["amber"], str(write_parquet(tmp_path / "b.parquet", bare)), None, None).chunks())


def test_amber_rows_that_are_left_out(tool: ModuleType, tmp_path: Path) -> None:
    labels = [
        {"id": 1005, "type": "discriminative-attribute-state", "truth": "maybe"},
        {"id": 1006, "type": "discriminative-colour", "truth": "no"},
        {"id": "1007", "type": "discriminative-attribute-action", "truth": "yes"},
        {"id": 8633, "type": "discriminative-hallucination", "truth": ["no"]},
        {"id": 13558, "type": "relation"},
    ]
    raw = amber_folder(tmp_path / "AMBER", labels)
    (found,) = build(tool, "amber", raw, tmp_path / "out", "--images", raw / "image")
    assert found.key == "amber/1007", "an id is the same as text"
    wanted = [
        ("field", "its truth 'maybe' must be yes or no"),
        ("field", "type='discriminative-colour' must be one of"),
        ("field", "truth=['no'] must be text"),
        ("empty_answer", "annotations.json has no id=13557"),
        ("empty_answer", "it has no type and truth"),
    ]
    for (_, kind, reason), (wanted_kind, part) in zip(left_out(tmp_path / "out", "amber"), wanted, strict=True):
        assert kind == wanted_kind and part in reason, reason


def test_amber_without_its_answers_is_refused(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = amber_folder(tmp_path / "AMBER")
    labels, query = raw / "data/annotations.json", raw / "data/query/query_discriminative.json"
    command = ("amber", "--input", query, "--images", raw / "image")
    twice = [{"id": 1005, "type": "relation", "truth": "no"}] * 2
    for number, (written, message) in enumerate(
        (
            (twice, "annotations.json: it has id=1005 twice"),
            ([{"type": "relation"}], "annotations.json: it must be an array of objects with an id"),
            ({"rows": []}, "annotations.json: it must be an array of objects with an id"),
        )
    ):
        write_json(labels, written)
        assert message in refused(tool, capsys, tmp_path / f"out{number}", *command)
    labels.write_text('[{"id": 1005')
    assert "annotations.json: it is not JSON" in refused(tool, capsys, tmp_path / "cut", *command)
    labels.rename(raw / "data/query/annotations.json")
    write_json(labels, twice)
    assert "may both hold the answers" in refused(tool, capsys, tmp_path / "both", *command)
    for path in (labels, raw / "data/query/annotations.json"):
        path.unlink()
    said = refused(tool, capsys, tmp_path / "none", *command)
    assert "no sample is left of 6" in said and "annotations.json, which belongs into the folder of this file" in said


def test_changed_answers_are_another_build(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The file of answers is an input like the questions; worker processes are told where it is."""
    raw = amber_folder(tmp_path / "AMBER")
    source = open_benchmark(BENCHMARKS["amber"], str(raw), None, str(raw / "image"))
    assert [file.name for file in source.files] == ["query_discriminative.json", "annotations.json"]
    sent = pickle.loads(pickle.dumps(source))
    samples = [sample for chunk in source.chunks() for sample in sent.read(chunk)]
    assert [isinstance(sample, RawSample) and sample.key for sample in samples] == [f"amber/{key}" for key in AMBER]
    arguments = ["amber", "--input", str(raw), "--images", str(raw / "image"), "--workers", "0"]
    for message in ("samples in 1 shards", "is complete already"):
        tool.main([*arguments, "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().out
    write_json(raw / "data/annotations.json", [{"id": key, "type": "relation", "truth": "no"} for key in AMBER])
    with pytest.raises(SystemExit):
        tool.main([*arguments, "--out", str(tmp_path / "out")])
    assert "of another build" in capsys.readouterr().err


# ---------------------------------------------------------------- HallusionBench
def hallusion_rows() -> list[dict[str, Any]]:
    row = {"category": "VS", "subcategory": "chart", "set_id": "0", "sample_note": "x", "gt_answer_details": "y"}
    asked = {"question_id": "1", "question": "Is China bigger than Russia?"}
    return [
        {**row, **asked, "visual_input": "0", "figure_id": "0", "gt_answer": "0", "filename": None},
        {**row, **asked, "visual_input": "1", "figure_id": "1", "gt_answer": "0", "filename": "./VS/chart/0_1.png"},
        {**row, **asked, "visual_input": "2", "figure_id": "2", "gt_answer": "1", "filename": "./VS/chart/0_2.png"},
        {**row, **asked, "visual_input": "1", "figure_id": "3", "gt_answer": "2", "filename": "./VS/chart/0_1.png"},
        {**row, **asked, "visual_input": "1", "figure_id": "4", "gt_answer": "1", "filename": None},
    ]


def check_hallusion(out: Path, found: Sequence[Prompt]) -> None:
    assert {sample.problem for sample in found} == {"Is China bigger than Russia?\nAnswer yes or no."}
    assert {sample.source for sample in found} == {"hallusionbench/VS/chart"}
    assert [sample.key for sample in found] == [f"hallusionbench/VS/chart/0_{figure}_1" for figure in range(3)]
    assert [sample.metadata["visual_input"] for sample in found] == ["0", "1", "2"]
    assert [levels(sample) for sample in found] == [[], [1], [2]]
    figures = ["", "VS/chart/0_1", "VS/chart/0_2"]  # the question without one belongs to none
    assert [yes_no_of(sample) for sample in found] == [YesNo(question="VS/chart/0_1", figure=name) for name in figures]
    for sample in found[:2]:
        graded(sample, ["No", "no.", "NO"], ["Yes", "yes", "0"])
    graded(found[2], ["Yes", "yes"], ["no", "1", "True"])
    assert [kind for _, kind, _ in left_out(out, "hallusionbench")] == ["field", "placeholders"]


def test_hallusionbench_of_the_hub(tool: ModuleType, tmp_path: Path) -> None:
    """Rows without image are in a file of their own."""
    rows = [
        {**row, "image": None if row["filename"] is None else struct(int(row["filename"][-5]))}
        for row in hallusion_rows()
    ]
    for row in rows:
        row["filename"] = ""
    write_parquet(tmp_path / "hub/data/image-00000-of-00001.parquet", rows[1:], ["image"])
    write_parquet(tmp_path / "hub/data/non_image-00000-of-00001.parquet", rows[:1])
    found = build(tool, "hallusionbench", tmp_path / "hub", tmp_path / "out")
    check_hallusion(tmp_path / "out", [found[2], *found[:2]])
    images = build(tool, "hallusionbench", tmp_path / "hub", tmp_path / "images", "--split", "image")
    assert [len(sample.images) for sample in images] == [1, 1]


def test_hallusionbench_of_its_authors_in_processes(tool: ModuleType, tmp_path: Path) -> None:
    """The script itself, with two worker processes, gives the bytes of this process."""
    write_images(tmp_path / "hallusion_bench", {"VS/chart/0_1.png": 1, "VS/chart/0_2.png": 2})
    source = write_json(tmp_path / "HallusionBench.json", hallusion_rows())
    images = ("--images", str(tmp_path / "hallusion_bench"))
    check_hallusion(tmp_path / "out", build(tool, "hallusionbench", source, tmp_path / "out", *images))
    script = [sys.executable, str(TOOLS / "build_benchmark.py"), "hallusionbench", "--input", str(source), *images]
    command = [*script, "--out", str(tmp_path / "processes"), "--workers", "2"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "left out: 1 field, 1 placeholders" in printed
    assert hashes(tmp_path / "processes") == hashes(tmp_path / "out")
