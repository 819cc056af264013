"""Twenty steps of the quickstart: data, a short cold start, two-pass rollouts, updates, evaluations, export."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch

from benchmarks.gpu_check.digits import call, made_digits, metrics
from benchmarks.gpu_check.report import Figure, Report

STEPS = 20
PARTS = ("save", "sync", "rollout", "reward", "train")
SHOWN = ("accuracy", "second_pass_accuracy", "format", "logprob_gap", "grad_norm", "tokens_per_second")
NUMBERS = ("logprob_gap", "grad_norm", "loss/")  # metrics that must be numbers in every step; others may be of nothing
MAX_FIRST_KL = 1e-4  # on a card, where scoring and training passes may choose other kernels; exactly 0 on a CPU


def run(folder: Path) -> Report:
    """Median seconds of a step's parts, first and last values of what is trained for. Wrong: a step that is missing, a
    number that is not finite, KL that does not begin at 0."""
    digits = made_digits(folder.parent)
    words = (f"model.hf_dir={digits / 'sft' / 'hf'}", f"train.steps={STEPS}", f"train.save_every={STEPS // 2}")
    seconds = call("grpo", "examples/quickstart/grpo.yaml", digits, folder / "grpo", *words)
    entries = metrics(folder / "grpo")
    figures: dict[str, Figure] = {"steps": len(entries), "seconds, start and evaluations included": round(seconds, 1)}
    wrong = step_faults(entries, STEPS, MAX_FIRST_KL if torch.cuda.is_available() else 0.0)
    return Report(figures | step_figures(entries), wrong=wrong)


def step_figures(entries: list[dict[str, float | None]]) -> dict[str, Figure]:
    """Medians of the seconds; first -> last of the metrics of SHOWN that there are."""
    figures: dict[str, Figure] = {}
    for part in PARTS:
        taken = [value for entry in entries if (value := entry.get(f"seconds/{part}")) is not None]
        if taken:
            figures[f"seconds/{part}, median"] = round(statistics.median(taken), 3)
    for name in SHOWN:
        figures[f"{name}, first -> last"] = f"{_text(entries[0].get(name))} -> {_text(entries[-1].get(name))}"
    return figures


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def step_faults(entries: list[dict[str, float | None]], steps: int, max_first_kl: float) -> list[str]:
    """One line for each."""
    wrong = []
    found = [entry["step"] for entry in entries]
    if found != list(range(steps)):
        wrong.append(f"metrics.jsonl has steps {found} instead of 0 to {steps - 1}")
    for entry in entries:
        numbers = {name: value for name, value in entry.items() if name.startswith(NUMBERS)}
        bad = [name for name, value in numbers.items() if value is None or not math.isfinite(value)]
        if bad or not numbers:
            wrong.append(f"step {entry['step']}: {', '.join(bad) or 'the metrics of training'} are no finite numbers")
    for name, value in (entries[0] if entries else {}).items():
        if name.endswith("/kl") and not (value is not None and abs(value) <= max_first_kl):
            wrong.append(f"{name} of the first step is {value} instead of 0: reference and policy are the same then")
    return wrong
