"""docs/your-own-data.md: its files, commands and snippets, in their order, in an empty folder."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sr1.prompts import SHIPPED
from tests.commands import REPOSITORY, call_forked, run_forked

PAGE = (REPOSITORY / "docs" / "your-own-data.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def of_kind(kind: str) -> list[str]:
    return [text for name, text in BLOCKS if name == kind]


def _tool(name: str, words: list[str]) -> None:
    sys.argv = [name, *words]
    runpy.run_path(str(REPOSITORY / "tools" / f"{name}.py"), run_name="__main__")


def _snippet(text: str) -> None:
    exec(compile(text, "docs/your-own-data.md", "exec"), {"__name__": "__main__"})


def _run(line: str, folder: Path) -> str:
    program, *words = shlex.split(line)
    if program == "megatron-sr1":
        return run_forked([sys.executable, "-m", "megatron_sr1.cli", *words], folder=folder)
    tool = re.fullmatch(r"tools/(\w+)\.py", words[0])
    assert program == "python" and tool is not None, line
    return call_forked(_tool, tool[1], words[1:], folder=folder)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder after all of the page, and what each command and snippet has printed, by its first words."""
    folder, printed = tmp_path_factory.mktemp("mine"), {}
    for kind, text in BLOCKS:
        if kind == "yaml":
            (folder / "my-run.yaml").write_text(text)
        elif kind == "python":
            printed[text.splitlines()[-1]] = call_forked(_snippet, text, folder=folder)
        elif kind == "bash":
            printed |= {" ".join(line.split()[:2]): _run(line, folder) for line in text.splitlines()}
    return folder, printed


def test_the_page_leads_to_a_trained_evaluated_exported_model(walked: tuple[Path, dict[str, str]]) -> None:
    folder, printed = walked
    mine = folder / "runs" / "mine"
    assert "2 samples in 1 shards" in printed["python tools/build_shards.py"]
    assert "12 samples looked at: 12 good, none" in printed["megatron-sr1 data"]
    assert (mine / "data.html").read_text().count("data:image/png") == 3
    assert "train.epochs=1 of 6 samples, train.batch_size=2: 3 steps" in printed["megatron-sr1 sft"]
    entries = [json.loads(line) for line in (mine / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert len(entries) == 3 and all(entry["heldout/loss"] > 0 for entry in entries)
    assert "rollout.prompts_per_step=2: 2 steps" in printed["megatron-sr1 grpo"]
    summary: dict[str, Any] = json.loads((mine / "grpo" / "eval" / "after.json").read_text())["summary"]
    assert summary["num_prompts"] == 4 and (mine / "grpo" / "evaluate" / "eval" / "evaluate.json").is_file()
    report = (mine / "grpo" / "report.html").read_text()
    assert "After step 2" in report and "demonstrations-heldout-00000003" in report
    assert "Held-out demonstrations" in report and "Learning rate" in report and "Loss" in report
    assert "written" not in printed["megatron-sr1 report"] or "report.html" in printed["megatron-sr1 report"]
    answer = next(text for line, text in printed.items() if "batch_decode" in line)
    assert answer.strip() and "Error" not in answer


def test_the_layouts_are_what_the_parser_accepts() -> None:
    (examples,) = of_kind("text")
    found = re.findall(r"^(accepted|refused) (\w+): (.*?)(?=^accepted|^refused|\Z)", examples, re.MULTILINE | re.DOTALL)
    assert len(found) == examples.count("accepted ") + examples.count("refused ") == 17
    for verdict, template, response in found:
        parsed = SHIPPED.by_name[template].parse(response.rstrip("\n"))
        assert (parsed is not None) == (verdict == "accepted"), response


def test_the_rows_of_the_page_are_rows() -> None:
    prompt, demonstration = (json.loads(text) for text in of_kind("json"))
    assert prompt.keys() == {"problem", "answer", "images"}
    assert SHIPPED.by_name[demonstration["template"]].parse(demonstration["response"]) is not None
    assert yaml.safe_load(of_kind("yaml")[0])["train"]["epochs"] == 1
