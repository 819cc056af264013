"""The study's short form, whole: data, cold start, runs, dependency, costs with a real server, tables; and resumed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import study
from benchmarks.dependency import auc, graded, write_measures
from benchmarks.step_cost import Cost, table
from benchmarks.study import FULL, SHORT
from megatron_sr1.launch.sweep import read_sweep
from megatron_sr1.streams.methods import METHODS
from tests.commands import run_forked

ROOT = Path(__file__).parents[1]


def test_both_forms_are_what_the_makefile_and_the_docs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    full, short = read_sweep(FULL.sweep), read_sweep(SHORT.sweep)
    presets = list(dict.fromkeys(run.preset for run in full.runs))
    assert presets[:4] == ["see_think", "vision_sr1", "gdpo", "perception_credit"]
    assert len(presets) == 9 and set(presets[4:]) <= set(METHODS) and len(full.runs) == 27
    assert {run.preset for run in short.runs} <= set(presets)
    shared = full.config_of(full.runs[0])
    for run in full.runs:
        config = full.config_of(run)
        assert (config.model, config.data, config.rollout, config.train) == (
            shared.model,
            shared.data,
            shared.rollout,
            shared.train,
        )
        assert config.objective.kl_coef == 0 and config.seed == run.seed


def test_auc_by_hand_and_against_sklearn() -> None:
    from sklearn.metrics import roc_auc_score

    assert auc(np.array([1.0, 2.0, 3.0]), np.array([False, True, True])) == 1.0
    assert auc(np.array([1.0, 1.0]), np.array([False, True])) == 0.5
    assert math.isnan(auc(np.array([1.0]), np.array([True])))
    rng = np.random.default_rng(1)
    for _ in range(20):
        values, positive = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
        assert auc(values, positive) == pytest.approx(roc_auc_score(positive, values), rel=1e-12)


def test_tokens_are_graded_by_kind() -> None:
    digit, inside, behind = (np.array(x, bool) for x in ([0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]))
    row = graded([np.array([0.0, 3.0, 1.0, 2.0]), None], [(digit, inside, behind)] * 2)
    assert row == {"digits": 3.0, "others": 1.0, "auc": 1.0, "auc_in_description": 1.0, "auc_repeated": 0.0}


def test_measures_are_added_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    write_measures(tmp_path, {"a": 1.0})
    write_measures(tmp_path, {"b": float("nan")})
    assert json.loads((tmp_path / "measures.json").read_text()) == {"a": 1.0, "b": None}


def test_costs_are_medians_beside_the_first() -> None:
    found = {"one": [Cost(1.0, 2.0, 100.0, 3), Cost(3.0, 4.0, 300.0, 4)], "two": [Cost(2.0, 6.0, 50.0, 9)]}
    lines = table(found).splitlines()
    assert lines[2] == "| one | 2.00 | 3.00 | 1.00 | 200 | 4 |" and lines[3] == "| two | 2.00 | 6.00 | 2.00 | 50 | 9 |"


def run_here(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
    """A command of the study, forked from what has imported its libraries; a sweep starts its runs itself."""
    if "sweep" in command:
        return subprocess.run(command, check=check, text=True)
    return subprocess.CompletedProcess(command, 0, run_forked(command, folder=Path.cwd()))


def short_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the short form has run, but for the costs."""
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    for name, value in (("PYTHONPATH", str(ROOT)), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"^0$"):
        patch.setattr(study, "subprocess", SimpleNamespace(run=run_here))
        study.main(["--short", "--no-costs"])
    return folder / SHORT.folder


@pytest.mark.slow
def test_the_short_form_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = short_form(tmp_path, monkeypatch)
    sweep_runs = sorted(path.name for path in (folder / "runs").iterdir() if path.is_dir())
    assert sweep_runs == ["caprl-seed1", "pgpo-seed1", "see_think-seed1"]
    for name in sweep_runs:
        assert "dependency_auc" in json.loads((folder / "runs" / name / "measures.json").read_text())
    tree = json.loads((folder / "runs" / "sweep.json").read_text())
    lines = (folder / "study.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| pgpo | 1 |"))
    assert f"{100 * tree[1]['after']['accuracy']['mean']:.1f}" in line


@pytest.mark.slow
def test_run_again_it_goes_on_with_the_costs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of which is that of a real server of the reader."""
    folder = short_form(tmp_path, monkeypatch)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.study", "--short"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == written
    costs = json.loads((folder / "costs.json").read_text())
    assert list(costs) == ["see_think", "pgpo", "caprl", "external_reasoner"]
    for each in costs.values():
        assert all(one["seconds"] > 0 and one["cpu_seconds"] > 0 and one["memory"] > 100 for one in each)
    alone, served = costs["see_think"][0], costs["external_reasoner"][0]
    assert served["processes"] >= alone["processes"] + 3 and served["memory"] > alone["memory"] + 100
    assert done.stdout.endswith((folder / "study.md").read_text() + "\n") and "| external_reasoner |" in done.stdout
