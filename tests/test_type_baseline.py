"""The type errors that `make lint` accepts: in the rooms of Megatron, vLLM and Triton only, and never more than now.

The file is basedpyright's own; no checker runs here. A room is the first name below the package, or a folder in it.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# Libraries there have few types, or wrong ones. Every other room is clean; a room may leave this list, none may enter.
ACCEPTED_ROOMS = ("convert", "kernels", "loops", "platform", "policy", "rollout/vllm", "weights")
MAX_ERRORS = 162
Baseline = dict[str, list[dict[str, Any]]]


def read_baseline() -> Baseline:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["basedpyright"]
    return json.loads((REPOSITORY / settings["baselineFile"]).read_text())["files"]


def problems(baseline: Baseline) -> list[str]:
    accepted = tuple(f"./megatron_sr1/{room}/" for room in ACCEPTED_ROOMS)
    total = sum(map(len, baseline.values()))
    return [
        *(f"{name}: this room has no type errors" for name in baseline if not name.startswith(accepted)),
        *([f"{total} type errors are accepted, at most {MAX_ERRORS}"] if total > MAX_ERRORS else []),
    ]


def test_the_accepted_errors_lie_where_they_may_and_are_no_more() -> None:
    assert problems(read_baseline()) == []


def test_accepted_rooms_and_files_exist() -> None:
    assert all((REPOSITORY / "megatron_sr1" / room).is_dir() for room in ACCEPTED_ROOMS)
    gone = [name for name in read_baseline() if not (REPOSITORY / name).is_file()]
    assert not gone, "make lint writes the file anew"


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("./megatron_sr1/data/shards.py", 1),
        ("./megatron_sr1/processor.py", 1),
        ("./megatron_sr1/rollout/two_pass.py", 1),
        ("./megatron_sr1/policy_of_mine/a.py", 1),
        ("./tests/test_policy.py", 1),
        ("./megatron_sr1/policy/model.py", MAX_ERRORS + 1),
    ],
)
def test_one_more_is_found(name: str, errors: int) -> None:
    assert len(problems({name: [{"code": "reportArgumentType"}] * errors})) == 1
