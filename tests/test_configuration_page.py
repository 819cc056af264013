"""docs/configuration.md is what the dataclasses say, and says of every key what it means."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from megatron_sr1.config import Config, values_by_key
from tests.tool_modules import TOOLS, load_tool
from tests.workspace import REPOSITORY


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("document_config")


def test_the_page_is_that_of_the_dataclasses(tool: ModuleType) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run: python tools/document_config.py"
    done = subprocess.run(
        [sys.executable, str(TOOLS / "document_config.py"), "--check"], text=True, capture_output=True, cwd=REPOSITORY
    )
    assert done.returncode == 0 and "as it should be" in done.stdout, done.stderr


def test_every_key_is_there_with_a_meaning(tool: ModuleType) -> None:
    sections = [("", Config()), *tool._sections(Config(), "")]
    rows = [row for prefix, section in sections for row in tool.keys_of(type(section), prefix)]
    assert {key for key, *_ in rows} == values_by_key(Config()).keys()
    assert [key for key, _, _, meaning in rows if not meaning] == []
    by_key = {key: row for key, *row in rows}
    assert by_key["objective.preset"][:2] == [
        "`vision_r1`, `see_think`, `summed`, `gdpo`, `vision_sr1`, `perception_credit`, `external_reasoner`, `papo`, "
        "`vppo`, `caprl`, `visionary_r1`, `pgpo`, `cappo`, `ves_rft`, `car`, `noisy_rollout`, `null`",
        '`"vision_sr1"`',
    ]
    assert by_key["optimizer.lr"] == ["number", "`1e-06`", "the highest, after the warm-up"]
