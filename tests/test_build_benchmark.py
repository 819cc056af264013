"""tools/build_benchmark.py on small files in the layout of the authors of each set, read back by our own reader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_sr1.types import Prompt
from tests.benchmark_cases import (
    BENT,
    LETTER,
    build,
    graded,
    left_out,
    levels,
    load_tool,
    struct,
    write_images,
    write_json,
    write_parquet,
)
from tests.data_cases import picture


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


# ---------------------------------------------------------------- MMMU
MMMU_IMAGES = [f"image_{number}" for number in range(1, 8)]


def mmmu_row(key: str, question: str, options: object, answer: str, **more: Any) -> dict[str, Any]:
    row = {"id": key, "question": question, "options": options, "explanation": "", "img_type": "['Tables']"}
    kind = "open" if options == "[]" else "multiple-choice"
    return {**row, "answer": answer, "topic_difficulty": "Easy", "question_type": kind, "subfield": "S", **more}


def test_mmmu(tool: ModuleType, tmp_path: Path) -> None:
    """Folders of subjects with three splits each; the validation split is what is built."""
    accounting = [
        mmmu_row("validation_Accounting_1", "<image 1> What is it?", "['$6', '$7', '$8']", "B", image_1=struct(1)),
        mmmu_row(
            "validation_Accounting_2", "Look at the table: <image 1>", "[]", "['24/7', '3.429']", image_1=struct(2)
        ),
        mmmu_row("validation_Accounting_3", "<image 1>", "[]", "1,200", image_1=struct(3)),
    ]
    many = mmmu_row(
        "validation_Art_Theory_12",
        "Is <image 2> or <image 1> like <image 3>? See <image 2>.",
        "['<image 4>', \"the one's left\", 'über – π', '\\\\frac{1}{2}']",
        "D",
        explanation="As <image 6> shows",
        **{f"image_{number}": struct(10 * number, "JPEG") for number in range(1, 7)},
    )
    source = tmp_path / "MMMU"
    write_parquet(source / "Accounting" / "validation-00000-of-00001.parquet", accounting, MMMU_IMAGES)
    write_parquet(source / "Art_Theory" / "validation-00000-of-00001.parquet", [many], MMMU_IMAGES)
    hidden = [mmmu_row("test_Accounting_1", "<image 1>?", "['a', 'b']", "?", image_1=struct(1))]
    write_parquet(source / "Accounting" / "test-00000-of-00001.parquet", hidden, MMMU_IMAGES)
    first, second, third, fourth = build(tool, "mmmu", source, tmp_path / "out")
    assert first.problem == f"What is it?\n(A) $6\n(B) $7\n(C) $8\n{LETTER}"
    assert (first.key, first.source) == ("mmmu/validation_Accounting_1", "mmmu/Accounting")
    assert first.metadata["choices"] == ("$6", "$7", "$8") and first.metadata["topic_difficulty"] == "Easy"
    graded(first, ["B", "(b)", "B.", r"\text{B}", "(B) $7"], ["A", "$7", "C", "(C) $8", ""])
    assert second.problem == "Look at the table: [image 1]"
    assert second.metadata["accepted_answers"] == ["24/7", "3.429"]
    graded(second, ["24/7", r"\frac{24}{7}"], ["24", "7/24", "A"])
    assert third.problem == "The image shows the question."
    graded(third, ["1200", "1,200"], ["1", "200"])
    assert fourth.problem == (
        f"Is [image 2] or [image 3] like [image 4]? See [image 2].\n(A) [image 5]\n(B) the one's left\n(C) über – π\n"
        f"(D) \\frac{{1}}{{2}}\n{LETTER}"
    )
    assert (fourth.source, levels(fourth)) == ("mmmu/Art_Theory", [50, 20, 10, 30, 40])
    graded(fourth, ["D", "d"], [r"\frac{1}{2}", "0.5", "A"])
    assert [levels(sample) for sample in (first, second, third)] == [[1], [2], [3]]
    assert left_out(tmp_path / "out", "mmmu") == []


def test_mmmu_rows_that_are_left_out(tool: ModuleType, tmp_path: Path) -> None:
    """Each is named by file and row with the reason; the others are built."""
    two, shown = "['a', 'b']", {"image_1": struct(1)}
    rows = [
        mmmu_row("test_Music_1", "<image 1> Good?", two, "A", **shown),
        mmmu_row("test_Music_2", "<image 1> Withheld?", two, "?", **shown),
        mmmu_row("test_Music_3", "<image 1> Cut?", "['a', 'b'", "A", **shown),
        mmmu_row("test_Music_4", "<image 2> Missing?", two, "A", **shown),
        mmmu_row("test_Music_5", "<image 1> Bent?", two, "A", image_1={"bytes": BENT, "path": None}),
        mmmu_row("test_Music_6", "<image 1> Beyond?", two, "C", **shown),
        mmmu_row("weird", "<image 1> Which?", two, "A", **shown),
        mmmu_row("test_Music_8", "<image 1> None?", "[]", "A", **shown) | {"question_type": "multiple-choice"},
        mmmu_row("test_Music_1", "<image 1> Again?", two, "A", **shown),
        mmmu_row("test_Music_9", "<image 1> Outside?", two, "A", image_1={"bytes": None, "path": "../x.png"}),
    ]
    source = write_parquet(tmp_path / "m" / "test-00000-of-00001.parquet", rows, MMMU_IMAGES).parent
    (sample,) = build(tool, "mmmu", source, tmp_path / "out", "--split", "test")
    assert sample.problem.startswith("Good?")
    wanted = [
        ("empty_answer", "not published"),
        ("field", "its options are no list: \"['a', 'b'\""),
        ("placeholders", "it mentions <image 2>, but has images [1]"),
        ("unreadable_image", "image 0"),
        ("field", "its answer 'C' is none of its 2 options"),
        ("field", "id='weird' names no subject"),
        ("field", "it has 0 options"),
        ("repeated_key", "'mmmu/test_Music_1' is taken"),
        ("unreadable_image", "leads outside"),
    ]
    found = left_out(tmp_path / "out", "mmmu")
    assert [where for where, _, _ in found] == [f"test-00000-of-00001.parquet, row {row}" for row in range(1, 10)]
    for (_, kind, reason), (wanted_kind, part) in zip(found, wanted, strict=True):
        assert kind == wanted_kind and part in reason


def test_mmmu_pro(tool: ModuleType, tmp_path: Path) -> None:
    """The three settings in one copy of the repository; each name finds its own folder."""
    ten = [f"option {number}" for number in range(10)]
    row = mmmu_row("test_History_47", "<image 1> Who?", repr(ten), "J", image_1=struct(1), subject="History")
    del row["question_type"], row["subfield"]
    write_parquet(tmp_path / "pro/standard (10 options)/test-00000-of-00002.parquet", [row], MMMU_IMAGES)
    four = {**row, "id": "test_History_48", "options": repr(ten[:4]), "answer": "D"}
    write_parquet(tmp_path / "pro/standard (4 options)/test-00000-of-00002.parquet", [four], MMMU_IMAGES)
    seen = {"id": "test_History_49", "image": struct(3), "options": repr(ten), "answer": "I", "subject": "History"}
    unseen = {**seen, "id": "test_History_50", "image": None}
    write_parquet(tmp_path / "pro/vision/test-00000-of-00001.parquet", [seen, unseen], ["image"])
    (found,) = build(tool, "mmmu-pro-10", tmp_path / "pro", tmp_path / "ten")
    assert found.problem == "\n".join(["Who?", *(f"({'ABCDEFGHIJ'[n]}) option {n}" for n in range(10)), LETTER])
    assert (found.key, found.source, levels(found)) == ("mmmu-pro-10/test_History_47", "mmmu-pro-10/History", [1])
    graded(found, ["J", "(j)"], ["A", "I", "option 9"])
    (found,) = build(tool, "mmmu-pro-4", tmp_path / "pro", tmp_path / "four")
    assert found.problem.count("\n(") == 4 and found.source == "mmmu-pro-4/History"
    graded(found, ["D"], ["J", "C"])
    (found,) = build(tool, "mmmu-pro-vision", tmp_path / "pro/vision", tmp_path / "vision")
    assert found.problem == f"The image shows a question and its options. {LETTER}"
    assert found.metadata["choices"] == tuple(ten) and levels(found) == [3]
    graded(found, ["I", "i"], ["H", "1", "J"])
    assert [kind for _, kind, _ in left_out(tmp_path / "vision", "mmmu-pro-vision")] == ["placeholders"]


# ---------------------------------------------------------------- mathematics
def mathverse_rows() -> list[dict[str, Any]]:
    question = "In triangle ABC, angle A = 80°, then angle CED is ()\nChoices:\nA:40°\nB:60°\nC:$\\frac{1}{2}$\nD:140°"
    about = {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"}
    first = {"sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant", "question": question}
    first |= {"answer": "D", "question_type": "multi-choice", "metadata": about, "query_wo": "Question: x"}
    vision = {**first, "sample_index": "5", "problem_version": "Vision Only", "question": "", "answer": "C"}
    free = {"problem_index": "2", "question_type": "free-form", "question": "Find the area.", "answer": "14 \\pi"}
    free = {**first, **free, "sample_index": "6", "problem_version": "Vision Intensive"}
    unseen = {**free, "sample_index": "10", "problem_version": "Vision Only", "question": ""}
    return [first, vision, free, unseen]


def check_mathverse(found: Sequence[Prompt]) -> None:
    first, vision, free, unseen = found
    asked = "In triangle ABC, angle A = 80°, then angle CED is ()"
    assert first.problem == f"{asked}\n(A) 40°\n(B) 60°\n(C) $\\frac{{1}}{{2}}$\n(D) 140°\n{LETTER}"
    assert (first.key, first.source) == ("mathverse/Text_Dominant/1", "mathverse/Text Dominant")
    assert first.metadata["subfield"] == "Angle" and first.metadata["choices"][3] == "140°"
    graded(first, ["D"], ["A", "140"])
    assert vision.problem == f"The image shows the question.\n{LETTER}" and vision.source == "mathverse/Vision Only"
    graded(vision, ["C"], ["D"])
    assert (free.problem, unseen.problem) == ("Find the area.", "The image shows the question.")
    graded(free, [r"14\pi", "$14\\pi$", "14π", r"14 \pi cm"], ["14", r"7\pi", "D"])
    assert [levels(sample) for sample in found] == [[1], [2], [3], [4]]


def test_mathverse_of_the_hub(tool: ModuleType, tmp_path: Path) -> None:
    rows = [{**row, "image": struct(level)} for level, row in enumerate(mathverse_rows(), 1)]
    blind = {**rows[2], "sample_index": "11", "image": None}
    torn = {**rows[0], "sample_index": "12", "question": "Which?\nChoices:\nA:one\n or two\nB:three", "answer": "B"}
    write_parquet(tmp_path / "hub" / "testmini.parquet", [*rows, blind, torn], ["image"])
    *found, last = build(tool, "mathverse", tmp_path / "hub", tmp_path / "out")
    check_mathverse(found)
    assert (
        last.problem == f"{torn['question']}\n{LETTER}" and "choices" not in last.metadata
    )  # it is asked as it stands
    assert [kind for _, kind, _ in left_out(tmp_path / "out", "mathverse")] == ["placeholders"]
    text_only = [{**rows[0], "problem_version": "Text Only", "image": ""}]
    write_parquet(tmp_path / "hub" / "testmini_text_only.parquet", text_only)
    more = ("--split", "testmini_text_only")
    (found,) = build(tool, "mathverse", tmp_path / "hub", tmp_path / "text", *more)
    assert (found.key, found.images) == ("mathverse/Text_Only/1", ()) and "(D) 140°" in found.problem


def test_mathverse_of_its_authors(tool: ModuleType, tmp_path: Path) -> None:
    """One array, and a folder of images beside it."""
    names = {f"images_version_{level}/image_{level}.png": level for level in range(1, 5)}
    write_images(tmp_path / "images", names)
    rows = [{**row, "image": name} for name, row in zip(names, mathverse_rows(), strict=True)]
    write_json(tmp_path / "testmini.json", rows)
    more = ("--images", tmp_path / "images")
    check_mathverse(build(tool, "mathverse", tmp_path, tmp_path / "out", *more))
    with pytest.raises(SystemExit):
        build(tool, "mathverse", tmp_path, tmp_path / "none")  # without --images nothing is found


MATH_VISION = [
    {"id": "1", "question": "Which number is it?\n<image1>", "options": [], "answer": "60", "subject": "arithmetic"},
    {"id": "2", "question": "Which bike?\n<image1>", "options": [*"ABCDE"], "answer": "E", "subject": "logic"},
    {"id": "19", "question": "<image1>\nHow many?", "options": ["$2+4+3$", "$2 \\cdot 4$"], "answer": "B"},
    {"id": "33", "question": "The ant <image1> meets <image2>.\n<image7>", "options": [], "answer": "\\frac{3}{4}"},
]


def math_vision_rows() -> list[dict[str, Any]]:
    more = {"solution": None, "level": 2, "subject": "metric geometry - length"}
    return [{**more, **row, "image": f"images/{row['id']}.jpg"} for row in MATH_VISION]


def check_math_vision(found: Sequence[Prompt]) -> None:
    first, drawn, written, parts = found
    assert (first.problem, first.metadata) == ("Which number is it?\n[image 1]", {"level": 2})
    graded(first, ["60", "60.0", r"60^\circ"], ["61", "6", "A"])
    assert drawn.problem == f"Which bike?\n[image 1]\n(A)\n(B)\n(C)\n(D)\n(E)\n{LETTER}"
    assert (drawn.key, drawn.source) == ("math-vision/2", "math-vision/logic")
    graded(drawn, ["E", "e"], ["A", "2.718"])
    assert written.problem == f"How many?\n(A) $2+4+3$\n(B) $2 \\cdot 4$\n{LETTER}"
    assert written.source == "math-vision/metric geometry - length"
    graded(written, ["B"], ["8", "A"])
    assert parts.problem == "The ant [image 1] meets [image 2].\n[image 7]"  # parts of its one image
    graded(parts, ["3/4", "0.75"], ["4/3"])
    assert [levels(sample) for sample in found] == [[1], [2], [19], [33]]


def test_math_vision(tool: ModuleType, tmp_path: Path) -> None:
    """Of the hub, where testmini lies beside test; of the authors, as lines with a folder of images."""
    rows = [{**row, "decoded_image": struct(int(row["id"]))} for row in math_vision_rows()]
    write_parquet(tmp_path / "hub/data/test-00000-of-00001-3532b8d3.parquet", rows)
    write_parquet(tmp_path / "hub/data/testmini-00000-of-00001-f8ff70fc.parquet", rows[:1])
    check_math_vision(build(tool, "math-vision", tmp_path / "hub", tmp_path / "out"))
    assert len(build(tool, "math-vision", tmp_path / "hub", tmp_path / "mini", "--split", "testmini")) == 1
    own = tmp_path / "own"
    write_json(own / "data/test.jsonl", math_vision_rows())
    (own / "images").mkdir()
    for row in math_vision_rows():
        picture(int(row["id"])).save(own / row["image"], quality=100)
    check_math_vision(build(tool, "math-vision", own, tmp_path / "own-out", "--images", own))


# ---------------------------------------------------------------- perception
def test_realworldqa(tool: ModuleType, tmp_path: Path) -> None:
    letter = "Please answer directly with only the letter of the correct option and nothing else."
    word = "Please answer directly with a single word or number."
    rows = [
        (f"Where does it face?\n\nA. Left\nB. Straight ahead\nC. Right\n{letter}", "C"),
        (f"How many cars?\n{word}", "3"),
        (f"Is the light green?\n\n{word}", "No"),
        (f"Which sign, A or B?\n{letter}", "B"),
        (f"Which?\n\nA. one\nB. two\n{letter}", "D"),
    ]
    rows = [{"question": q, "answer": a, "image": struct(level, "WEBP")} for level, (q, a) in enumerate(rows)]
    write_parquet(tmp_path / "in/data/test-00000-of-00001.parquet", rows, ["image"])
    direction, count, light, sign = build(tool, "realworldqa", tmp_path / "in", tmp_path / "out")
    assert direction.problem == f"Where does it face?\n(A) Left\n(B) Straight ahead\n(C) Right\n{LETTER}"
    assert direction.source == "realworldqa" and direction.key == "realworldqa/test-00000-of-00001-00000000"
    graded(direction, ["C"], ["Right", "A"])
    assert (count.problem, light.problem) == ("How many cars?", "Is the light green?")
    graded(count, ["3", "three", "3 cars"], ["4", "30"])
    graded(light, ["no", "No."], ["yes", "0"])
    assert sign.problem == f"Which sign, A or B?\n{LETTER}"
    graded(sign, ["B"], ["A"])
    assert [len(sample.images) for sample in (direction, count, light, sign)] == [1] * 4
    assert left_out(tmp_path / "out", "realworldqa")[0][1:] == ("field", "its answer 'D' is none of its 2 options")


def test_visnumbench(tool: ModuleType, tmp_path: Path) -> None:
    """Both scenes count from 0; older files have other names for the columns, and hold the rows under "data"."""
    ranges = "(a) (0.50, 0.60) (b) (0.0, 0.10) (c) (0.80, 0.90) (d) (0.20, 0.30)"
    new = {"id": "9_Scale", "question": "Which range?", "option": ranges, "answer": "(b) (0.0, 0.10)"}
    new |= {"task_class": "range estimation", "Attributes": "Scale"}
    old = {"id": "9_Scale", "text": "Which angle?", "option": "(a) 90° (b) 45°", "answer": "(a) 90°"}
    old |= {"task_class": "value estimation", "Major_categories": "Angle", "option_num": 2}
    write_images(tmp_path, {"Real/Scale/9.png": 1, "Synthetic/Angle/9.png": 2})
    write_json(tmp_path / "json/Real.json", [{**new, "image_path": "Real/Scale/9.png"}, "no object"])
    write_json(tmp_path / "json/Synthetic.json", {"total": 1, "data": [{**old, "image_path": "Synthetic/Angle/9.png"}]})
    hub = write_parquet(tmp_path / "hub/train-00000-of-00001.parquet", [{**new, "image": struct(3)}])
    real, synthetic = build(tool, "visnumbench", tmp_path / "json", tmp_path / "out", "--images", tmp_path)
    (same,) = build(tool, "visnumbench", hub, tmp_path / "hub-out")
    shown = f"Which range?\n(A) (0.50, 0.60)\n(B) (0.0, 0.10)\n(C) (0.80, 0.90)\n(D) (0.20, 0.30)\n{LETTER}"
    assert (real.problem, same.problem) == (shown, shown)
    assert (real.source, synthetic.source) == ("visnumbench/Scale", "visnumbench/Angle")
    assert real.key == "visnumbench/Real-00000000" and synthetic.key == "visnumbench/Synthetic-00000000"
    assert real.metadata["id"] == synthetic.metadata["id"] == "9_Scale"
    graded(real, ["B"], ["(0.0, 0.10)", "(a) (0.50, 0.60)", "D"])
    graded(synthetic, ["A", "(a) 90°"], ["B", "90"])
    assert [levels(sample) for sample in (real, synthetic, same)] == [[1], [2], [3]]
    assert left_out(tmp_path / "out", "visnumbench") == [
        ("Real.json, row 1", "unreadable_sample", "a str, not an object")
    ]
