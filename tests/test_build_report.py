"""What a build says of itself: counts of images, of what was changed and left out, and samples as a model sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from megatron_sr1.prompts import COT, SEE_THINK
from tests.build_cases import REASONED, load_tool, picture, run, run_jsonl, write_jsonl
from tests.data_cases import encoded

IMAGES = {f"{i}.png": encoded(picture(i, (40 + i, 30))) for i in range(3)}
ROWS = [
    {"problem": "<image> [bold]or[/bold] <image>?", "answer": 1, "choices": ["x", "y"], "images": ["0.png", "1.png"]},
    {"problem": "What is the tag <image>?", "answer": "text"},
    {"problem": "told", "response": REASONED, "description": "a dial"},
    {"problem": "one", "answer": "1", "image": "2.png"},
    {"problem": "no answer", "answer": None},
    {"problem": "overlooked", "answer": "1", "img": "2.png"},
    {"problem": "nor here", "answer": ""},
]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    yield from load_tool()


def test_everything_is_counted(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also over several shards, and again in a second run, which only reads the report."""
    out = run_jsonl(tool, tmp_path, ROWS, IMAGES, "--max-shard-mb", 0.009)
    report = json.loads((out / "train.report.json").read_text())
    assert len(report["shards"]) > 1
    assert report["images_per_sample"] == {"0": 2, "1": 1, "2": 1}
    assert report["changed"] == {"image_marks": 1, "mark_as_text": 1, "options": 1}
    assert report["left_out"] == {"empty_answer": 2, "image_columns": 1}
    first = capsys.readouterr().out
    for line in (
        "images per sample: 0: 2, 1: 1, 2: 1",
        "changed: 1 image_marks, 1 mark_as_text, 1 options",
        "left out: 2 empty_answer, 1 image_columns (see ",
        "data.jsonl, line 5: it has no answer; its columns are problem, answer",
        "line 6: the column 'img' looks like an image",
    ):
        assert line in first
    assert "line 7" not in first, "one of each kind"
    run(tool, "--input", tmp_path / "in", "--format", "jsonl", "--out", out, "--max-shard-mb", 0.009)
    assert "complete already" in (again := capsys.readouterr().out) and "images per sample: 0: 2" in again


@pytest.mark.parametrize("number", [0, 2, 9])
def test_samples_are_shown_as_a_model_sees_them(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, tiny_model_dir: str, number: int
) -> None:
    """Without a model the user's turn; with one the whole prompt, by its own chat template."""
    problem = "[image 1] [bold]or[/bold] [image 2]?\n(A) x\n(B) y\nAnswer with the letter of the correct option."
    source = write_jsonl(tmp_path / "in", ROWS, IMAGES)
    call = ("--input", source, "--format", "jsonl", "--show", number, "--max-shard-mb", 0.009)
    run(tool, *call, "--out", tmp_path / "plain")
    plain = capsys.readouterr().out
    assert plain.count("\n--- sample ") == min(number, 4)
    run(tool, *call, "--out", tmp_path / "model", "--model", tiny_model_dir)
    by_model = capsys.readouterr().out
    if not number:
        return
    assert (
        f"<image 1><image 2>{SEE_THINK.user_text(problem)}\nimage 1: 40 x 30 pixels\nimage 2: 41 x 30 pixels\n" in plain
    )
    assert "answer: B\nchoices: ['x', 'y']\n" in plain
    assert f"\n{COT.user_text('What is the tag <image>?', 0)}\nanswer: text\n" in plain
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    content = [{"type": "image"}] * 2 + [{"type": "text", "text": SEE_THINK.user_text(problem)}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert f"\n{rendered}\nimage 1: 40 x 30 pixels\n" in by_model
    assert (f"response: {REASONED}\n" in plain) is (number == 9)


def test_nothing_left_says_why(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run_jsonl(tool, tmp_path, [{"question": "Which?", "solution": "3"}], {})
    assert "line 1: it has no problem; its columns are question, solution" in capsys.readouterr().err
