"""A run that is killed after a checkpoint and started again ends as one that never stopped.

    whole   a run with engines, to its end
    cut     trains on whole's rollouts, is killed (SIGKILL, all ranks) after a checkpoint, and the same command goes on
    whole   is given more steps: it goes on from its last checkpoint with engines

cut's weights must be whole's: to the bit on a CPU. On a card attention is asked to be deterministic; where a sum is not
in spite of that, the distance is in proportion to what training has changed, with a bound.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.gpu_check.digits import call, command, made_digits, metrics
from benchmarks.gpu_check.private import REPOSITORY
from benchmarks.gpu_check.report import Figure, Report

CONFIG = "examples/quickstart/grpo.yaml"
STEPS, MORE = 6, 2
KILLED_AFTER = 2  # the checkpoint that the cut run goes on from, or the one behind it
MAX_DISTANCE = 0.05  # on a card, of the norm of what training changed; AdamW's first steps enlarge a sum's rounding
WAIT_S = 240.0
SMALL = ("rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "train.batch_size=4", "evaluate.verify_export=0")


def run(folder: Path) -> Report:
    """Figures of the comparison. Wrong: weights that differ, steps that are missing or there twice."""
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's word for deterministic attention
    digits = made_digits(folder.parent)
    words = (*SMALL, f"model.hf_dir={digits / 'sft' / 'hf'}", f"train.steps={STEPS}", "train.save_every=1")
    whole, cut = folder / "whole", folder / "cut"
    call("grpo", CONFIG, digits, whole, *words)
    trained = weights(whole / "hf")
    replay = ("--train-only", "--from-rollouts", str(whole / "rollouts"))
    saved = kill_after_checkpoint(command("grpo", CONFIG, digits, cut, *words, *replay), cut, KILLED_AFTER, STEPS)
    call("grpo", CONFIG, digits, cut, *words, *replay)
    figures, wrong = compared(trained, weights(cut / "hf"), weights(digits / "sft" / "hf"))
    figures["killed when these were saved"] = ", ".join(map(str, saved))
    call("grpo", CONFIG, digits, whole, *words[:-2], f"train.steps={STEPS + MORE}", "train.save_every=1")
    for name, path, steps in (("cut", cut, STEPS), ("whole, extended with engines", whole, STEPS + MORE)):
        figures[f"steps of {name}"] = len(metrics(path))
        wrong += step_faults(name, path, steps)
    return Report(figures, wrong=wrong)


def step_faults(name: str, run_dir: Path, steps: int) -> list[str]:
    """A line where the run's metrics lack one of its steps, or have one twice."""
    found = [entry["step"] for entry in metrics(run_dir)]
    if found == list(range(steps)):
        return []
    return [f"{name}: metrics.jsonl has steps {found} instead of 0 to {steps - 1}"]


def kill_after_checkpoint(words: list[str], run_dir: Path, step: int, last: int) -> list[int]:
    """Kills a run with all its ranks when it has saved `step`; the steps that are saved then.

    Args:
        words: the command, of `last` steps.

    Raises:
        RuntimeError: it ended before.
    """
    from megatron_sr1.config import saved_steps

    process = subprocess.Popen(words, cwd=REPOSITORY, process_group=0)
    end = time.monotonic() + WAIT_S
    try:
        while time.monotonic() < end and process.poll() is None:
            saved = saved_steps(run_dir / "checkpoints")
            if saved and saved[-1] >= step:
                break
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    saved = saved_steps(run_dir / "checkpoints")
    if status != -signal.SIGKILL or not saved or saved[-1] == last:
        raise RuntimeError(f"the run was to be killed in its middle; it ended with {status}, saved: {saved}")
    return saved


def weights(hf_dir: Path) -> dict[str, torch.Tensor]:
    """Of an export, by name."""
    from megatron_sr1.weights import HfTensors

    tensors = HfTensors(hf_dir)
    return {name: tensors[name].clone() for name in tensors.tensors}


def compared(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], before: dict[str, torch.Tensor]
) -> tuple[dict[str, Figure], list[str]]:
    """Figures, and what is wrong, of the weights of two runs that began with `before`."""
    if one.keys() != other.keys():
        return {}, [f"the two exports have other tensors: {sorted(one.keys() ^ other.keys())[:3]}"]
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    apart = sum((one[name].double() - other[name].double()).square().sum().item() for name in one) ** 0.5
    moved = sum((one[name].double() - before[name].double()).square().sum().item() for name in one) ** 0.5
    bound = MAX_DISTANCE if torch.cuda.is_available() else 0.0
    figures: dict[str, Figure] = {
        "tensors": len(one),
        "tensors that are not the same to the bit": len(differing),
        "norm of what training changed": moved,
        "distance in proportion to it": apart / moved if moved else None,
        "bound of it": bound,
    }
    if not moved:
        return figures, ["training changed nothing, so nothing is shown"]
    if not apart <= bound * moved:
        return figures, [f"{len(differing)} tensors differ after the resume, by {apart / moved:.3g} of what changed"]
    return figures, []
