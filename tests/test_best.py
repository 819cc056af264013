"""Which checkpoint of a run is the best by one of its evaluations' numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sr1.config import ConfigError, check_command, load_config
from megatron_sr1.evaluation.best import best_step, measured
from megatron_sr1.evaluation.files import EvaluationFiles, check_measured
from tests.model_zoo import create_family

NUMBERS = {
    "before": (0, {"accuracy": 0.9, "leak": 0.1}),
    "step-10": (10, {"accuracy": 0.5, "leak": 0.3}),
    "step-20": (20, {"accuracy": 0.7, "leak": None}),
    "step-30": (30, {"accuracy": 0.7, "leak": float("nan")}),
    "after": (40, {"accuracy": 0.6, "leak": 0.2}),
    "evaluate": (0, {"accuracy": 1.0}),  # of another model
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "eval").mkdir()
    for label, (step, numbers) in NUMBERS.items():
        (tmp_path / "eval" / f"{label}.json").write_text(json.dumps({"step": step, "summary": numbers}))
    return tmp_path


def test_the_first_of_equal_ones_is_the_best(run_folder: Path) -> None:
    steps = [10, 20, 30, 40]
    assert best_step(measured(run_folder, "accuracy"), "max", steps) == 20
    assert best_step(measured(run_folder, "accuracy"), "min", steps) == 10
    assert best_step(measured(run_folder, "accuracy"), "max", [10, 40, 50]) == 40, "of the checkpoints that are left"
    assert best_step(measured(run_folder, "leak"), "min", steps) == 40, "what was not measured is not the best"
    assert best_step(measured(run_folder, "absent"), "max", steps) is None
    assert best_step(measured(run_folder, "accuracy"), "max", [50]) is None
    assert measured(run_folder, "accuracy") == {0: 0.9, 10: 0.5, 20: 0.7, 30: 0.7, 40: 0.6}
    assert best_step(measured(run_folder / "none", "accuracy"), "max", steps) is None


def test_a_number_that_is_not_measured_is_refused_with_those_that_are(run_folder: Path) -> None:
    check_measured(EvaluationFiles(run_folder, "before"), "leak")
    for label, name in (("before", "acc"), ("step-20", "leak")):
        with pytest.raises(ConfigError, match=rf"train\.keep_best='{name}'.*they measure accuracy"):
            check_measured(EvaluationFiles(run_folder, label), name)


def test_the_cold_start_evaluates_nothing(tmp_path: Path) -> None:
    model = create_family(tmp_path / "model", "qwen2_5_vl_tied")
    words = ("train.keep_best=accuracy", "train.evaluate_every=10", f"model.hf_dir={model}", "data.cold_start=[x]")
    config: Any = load_config(None, list(words))
    with pytest.raises(ConfigError, match=r"train\.keep_best='accuracy'.*empty for sft"):
        check_command("sft", config)
