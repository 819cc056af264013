"""gpu-check's checks: all of them are there, every test marked gpu is among them, and each can find something wrong."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import logprob
from benchmarks.gpu_check import canary, gpu_tests, kernels, largest, resume, trace
from benchmarks.gpu_check.checks import BUDGET_S, CHECKS
from benchmarks.gpu_check.comparison import Bounds, Measured, distances
from benchmarks.gpu_check.quickstart import step_faults
from benchmarks.gpu_check.random_model import num_layers, with_layers
from benchmarks.gpu_check.report import Absent

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = sorted((REPOSITORY / "examples" / "models").glob("*/config.json"))


def test_every_check_is_a_module_that_runs_within_the_budget() -> None:
    names = [check.name for check in CHECKS]
    assert names[0] == "environment" and len(set(names)) == len(names)
    for check in CHECKS:
        module = find_spec(f"benchmarks.gpu_check.{check.command[-1]}")
        assert module is not None and module.origin is not None, check.name
        functions = {
            node.name: node for node in ast.parse(Path(module.origin).read_text()).body if hasattr(node, "name")
        }
        assert [argument.arg for argument in functions["run"].args.args] == ["folder"], check.name
        assert 0 < check.limit_s <= BUDGET_S <= 25 * 60


# ---------------------------------------------------------------- tests marked gpu
def _marked() -> set[str]:
    """Files of tests in which the mark is used."""
    found = set()
    for path in (REPOSITORY / "tests").rglob("*.py"):
        marks = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        if any(node.attr == "gpu" and getattr(node.value, "attr", "") == "mark" for node in marks):
            found.add(path.relative_to(REPOSITORY / "tests").as_posix())
    return found


def test_every_test_that_is_marked_gpu_is_run() -> None:
    """The mark alone picks, over all tests; and pytest looks into each file that has it."""
    words = gpu_tests.command(Path("x.xml"))[3:]
    options = [word for word in words if word.startswith("-") and not word.startswith("--junitxml")]
    assert (
        options == ["-m", "--no-header", "-rA", "--continue-on-collection-errors"]
        and words[1] == "gpu"
        and words[-1] == "tests"
    )
    assert [word for word in words if word.endswith(".py") or "::" in word] == []
    assert {"test_precision.py", "test_fused_loss.py", "test_triton_logprob.py"} <= _marked()
    assert [name for name in _marked() if not Path(name).name.startswith("test_")] == []


CASES = [("tests.test_a", "one", "passed", ""), ("tests.test_a", "two", "skipped", "no TE"), ("b", "3", "passed", "")]


def test_tests_that_fail_or_are_skipped_are_named() -> None:
    report = gpu_tests.judged(CASES, 0)
    assert report.figures == {"passed": 2, "failed": 0, "skipped": 1} and not report.wrong
    assert report.tables[0].rows == [("tests.test_a", 1, 0, 1), ("b", 1, 0, 0)]
    assert report.tables[1].rows == [("two", "skipped", "no TE")]
    assert gpu_tests.judged([*CASES, ("b", "4", "failed", "off")], 1).wrong == ["1 of 4 tests failed"]
    assert gpu_tests.judged(CASES, 3).wrong == ["pytest ended with 3"]
    assert gpu_tests.judged([], 5).wrong == ["pytest found no test that is marked gpu"]
    with pytest.raises(Absent, match="all 1 tests were skipped: no TE"):
        gpu_tests.judged(CASES[1:2], 0)


# ---------------------------------------------------------------- what a check finds wrong
def test_steps_that_are_missing_not_finite_or_begin_away_from_the_reference() -> None:
    good: list[dict[str, float | None]] = [
        {"step": step, "grad_norm": 1.0, "logprob_gap": 0.0, "loss/a/kl": 0.1 * step, "mismatch/x": None}
        for step in range(3)
    ]
    assert step_faults(good, 3, 0.0) == []
    assert "steps [0, 2] instead of 0 to 2" in step_faults([good[0], good[2]], 3, 0.0)[0]
    (fault,) = step_faults([good[0], good[1] | {"grad_norm": None}, good[2]], 3, 0.0)
    assert fault.startswith("step 1: grad_norm")
    assert step_faults([{"step": 0}], 1, 0.0)[0].startswith("step 0: the metrics of training")
    (fault,) = step_faults([good[0] | {"loss/a/kl": 1e-5}, *good[1:]], 3, 0.0)
    assert fault.startswith("loss/a/kl of the first step is 1e-05")
    assert step_faults([good[0] | {"loss/a/kl": 1e-5}, *good[1:]], 3, 1e-4) == []


def test_weights_that_differ_after_a_resume() -> None:
    before = {"a": torch.zeros(4), "b": torch.zeros(2)}
    one = {"a": torch.ones(4), "b": torch.zeros(2)}
    figures, wrong = resume.compared(one, {name: tensor.clone() for name, tensor in one.items()}, before)
    assert wrong == [] and figures["norm of what training changed"] == 2.0
    figures, wrong = resume.compared(one, {"a": one["a"], "b": torch.tensor([0.0, 1e-7])}, before)
    assert figures["tensors that are not the same to the bit"] == 1 and wrong[0].startswith("1 tensors differ")
    assert resume.compared(one, {"a": one["a"]}, before)[1] == ["the two exports have other tensors: ['b']"]
    assert resume.compared(before, before, before)[1] == ["training changed nothing, so nothing is shown"]
    nothing = {"a": torch.full((4,), float("nan")), "b": torch.zeros(2)}
    assert resume.compared(one, nothing, before)[1] != []


LIFE: dict[str, Any] = {
    "GiB of KV cache": 2.0,
    "GiB given back by sleep": 2.5,
    "same answers when woken": True,
    "same answers when restarted": True,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"GiB given back by sleep": None}, None),  # a CPU's engines do not sleep
        ({"GiB given back by sleep": 0.1}, "gave back 0.10 GiB"),
        ({"same answers when woken": False}, "the woken engine answers otherwise"),
        ({"same answers when restarted": False}, "the restarted engine answers otherwise"),
    ],
)
def test_an_engine_that_does_not_wake_whole(change: dict[str, Any], words: str | None) -> None:
    wrong = canary.faults("graphs", LIFE | change)
    assert (wrong == []) if words is None else (len(wrong) == 1 and words in wrong[0])


def test_answers_are_compared_up_to_where_they_part() -> None:
    one = [[[1, 2, 3], [-1.0, -2.0, -3.0]], [[4], [-1.0]]]
    other = [[[1, 2, 9], [-1.0, -2.5, -9.0]], [[4], [-1.0]]]
    assert canary.distance(one, one) == (0.0, 0.0, 0)
    assert canary.distance(one, other) == (0.5 / 3, 0.5, 1)


def test_policies_that_are_too_far_apart() -> None:
    one = Measured(torch.zeros(8), 1.0, 2.0, 3, 1.0, 1.0, None)
    bounds = Bounds(logprob=0.1, grad_norm=0.1)

    def wrong(**changes: Any) -> list[str]:
        return distances({"bf16": one, "fp8": replace(one, **changes)}, bounds)[1]

    assert wrong() == [] and wrong(logprobs=torch.full((8,), 0.09)) == []
    assert wrong(logprobs=torch.full((8,), 0.2))[0].startswith("log-probs of fp8 are 0.2 nats")
    assert wrong(grad_norm=4.0)[0].startswith("the gradient norm is 4 with fp8")  # one added twice
    assert wrong(logprobs=torch.full((8,), float("nan"))) and wrong(loss=float("inf")) == ["the loss of fp8 is inf"]
    assert wrong(logprobs=torch.zeros(7)) == ["bf16 scored 8 tokens and fp8 7"]


@dataclass(frozen=True)
class _Event:
    """An entry of torch.profiler's averages."""

    key: str
    device: str
    self_cpu_time_total: float
    self_device_time_total: float
    is_user_annotation: bool = False
    count: int = 1

    @property
    def device_type(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.device)


def test_a_kernel_is_counted_once() -> None:
    events = [_Event("aten::mm", "CPU", 5, 70), _Event("gemm", "CUDA", 0, 70), _Event("step", "CUDA", 0, 90, True)]
    assert trace.own_times(events, "CUDA") == {"gemm": (70, 1)}
    assert trace.own_times(events, "CPU") == {"aten::mm": (5, 1)}


# ---------------------------------------------------------------- kernels
SHAPE = logprob.Shape(tokens=8, hidden=4, vocab=16, tp=1, dtype="float32", threads=1)


def _broken(*inputs: torch.Tensor) -> torch.Tensor:
    raise TypeError("it takes four arguments\nand more")


def test_a_peer_that_fails_is_named_and_one_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "peak_memory", lambda *_: 1.0)
    logits = logprob.CANDIDATES["logits"]
    candidates = {"logits": logits, "peer": logprob.Entry(_broken, "torch")}
    monkeypatch.setattr(logprob, "CANDIDATES", candidates)
    table = kernels.logprob_table(logprob.measure(SHAPE, repeats=1))
    assert table.rows[1][-1] == "failed: TypeError: it takes four arguments" and table.rows[0][-1] == ""
    monkeypatch.setattr(logprob, "CANDIDATES", {"logits": logits, "ours": logprob.Entry(_broken)})
    with pytest.raises(TypeError):
        logprob.measure(SHAPE, repeats=1)


def test_one_of_ours_without_a_number_is_wrong_where_it_could_run() -> None:
    rows: dict[str, list[float] | str] = {"ours torch": "out of memory", "ours triton": "needs a GPU", "verl": "absent"}
    found = kernels.ours_without_numbers(logprob.Table(SHAPE, rows, 1.0))
    expected = ["ours torch: out of memory"] + (["ours triton: needs a GPU"] if torch.cuda.is_available() else [])
    assert found == expected


# ---------------------------------------------------------------- the largest recipe
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.name)
def test_a_model_with_fewer_layers_keeps_its_widths(path: Path) -> None:
    tree = json.loads(path.read_text())
    less = with_layers(tree, 5)
    assert num_layers(less) == 5 < num_layers(tree)
    text, cut = (whole.get("text_config", whole) for whole in (tree, less))
    changed = {key for key in text if text[key] != cut[key]}
    assert changed - {"max_window_layers", "text_config"} == {"num_hidden_layers"}
    assert less["vision_config"] == tree["vision_config"]


class _FewLayers:
    """Stands for a recipe of which so many layers fit."""

    def __init__(self, name: str, whole: int, most: int) -> None:
        self.name, self.whole, self._most = name, whole, most

    def __call__(self, layers: int) -> bool:
        return layers <= self._most

    def choice(self, layers: int) -> tuple[str, int]:
        return self.name, layers


def test_whole_models_go_before_larger_ones_in_part() -> None:
    def chosen(*tried: _FewLayers) -> Any:
        return largest.first_that_fits(tried)

    assert chosen(_FewLayers("large", 80, 40), _FewLayers("small", 36, 36)) == ("small", 36)
    assert chosen(_FewLayers("large", 80, 19), _FewLayers("small", 36, 35)) == ("small", 35)
    assert chosen(_FewLayers("large", 80, 20), _FewLayers("small", 36, 35)) == ("large", 20)
    assert chosen(_FewLayers("large", 80, 19), _FewLayers("small", 36, 8)) is None
