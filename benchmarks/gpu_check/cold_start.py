"""The quickstart's cold start, killed after a checkpoint and started again, ends as one that never stopped. No engine
takes part: Megatron-Core on images, its optimizer, checkpoints and the export, alone."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from benchmarks.gpu_check.digits import build_digits, call, command, metrics
from benchmarks.gpu_check.report import Figure, Report
from benchmarks.gpu_check.resume import compared, kill_after_checkpoint, step_faults, weights

CONFIG = "examples/quickstart/sft.yaml"
STEPS, KILLED_AFTER = 20, 4
ENDS = ("loss/sft/nll", "grad_norm")  # metrics whose way is shown


def run(folder: Path) -> Report:
    """Figures of the comparison and of the training. Wrong: weights that differ, a loss that does not fall, steps that
    are missing or there twice."""
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's word for deterministic attention
    digits = build_digits(folder.parent)
    base, whole, cut = digits / "base", folder / "whole", folder / "cut"
    words = (f"model.hf_dir={base}", f"train.steps={STEPS}", "train.batch_size=32", "train.save_every=2")
    seconds = call("sft", CONFIG, digits, whole, *words)
    saved = kill_after_checkpoint(command("sft", CONFIG, digits, cut, *words), cut, KILLED_AFTER, STEPS)
    call("sft", CONFIG, digits, cut, *words)
    figures, wrong = compared(weights(whole / "hf"), weights(cut / "hf"), weights(base))
    losses = [entry["loss/sft/nll"] for entry in metrics(whole)]
    wrong += [*step_faults("whole", whole, STEPS), *step_faults("cut", cut, STEPS)]
    if not losses[-1] < losses[0]:
        wrong.append(f"the loss went from {losses[0]} to {losses[-1]}")
    return Report(
        _training(whole, seconds) | figures | {"killed when these were saved": ", ".join(map(str, saved))}, wrong=wrong
    )


def _training(run_dir: Path, seconds: float) -> dict[str, Figure]:
    entries = metrics(run_dir)
    ends = {f"{name}, first -> last": f"{entries[0][name]:.4g} -> {entries[-1][name]:.4g}" for name in ENDS}
    step = statistics.median(entry["seconds/step"] for entry in entries)
    figures = {"steps": len(entries), "seconds, start included": round(seconds, 1), "seconds/step, median": step}
    return figures | ends
