"""The held-out demonstrations in the report of a cold start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sr1.report.demonstrations import demonstrations_section
from megatron_sr1.report.runs import ReportedRun
from megatron_sr1.training.heldout_loss import EXAMPLES_FILE, HeldoutExample, keep_examples

EVIL = "<script>alert(1)</script>"


def of(path: Path) -> ReportedRun:
    return ReportedRun(path, "", "", (), ())


def test_each_is_shown_with_its_loss_and_escaped(tmp_path: Path) -> None:
    assert demonstrations_section([of(tmp_path)]) == ""
    examples = [
        HeldoutExample(0, "d0", "cot", EVIL, EVIL, 1.23456, 7),
        HeldoutExample(1, "d<1>", "cot", "q", "r", None, 3),
    ]
    keep_examples(tmp_path, 4, examples)
    html = demonstrations_section([of(tmp_path)])
    assert "After step 4" in html and ">1.235<" in html and ">not finite<" in html and "d&lt;1&gt;" in html
    assert "<script" not in html and html.count("&lt;script&gt;") == 2


@pytest.mark.parametrize(
    "text", ["{", "[]", json.dumps({"step": 1, "examples": [{"key": 1}]}), json.dumps({"examples": []})]
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / EXAMPLES_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"heldout\.json is damaged"):
        demonstrations_section([of(tmp_path)])
