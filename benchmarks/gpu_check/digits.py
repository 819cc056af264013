"""The quickstart's data and a short cold start, made once for all checks that need them; runs of it as commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_check.private import REPOSITORY

SIZES = ("--train", "400", "--heldout", "32", "--demonstrations", "2000")
COLD_START_STEPS = 60


def device_words() -> list[str]:
    """What a card asks of the quickstart's configuration, which is for two ranks of a CPU: as many ranks as there are
    cards, bf16 as every recipe has it, and no comparison of the export with transformers in fp32."""
    count = torch.cuda.device_count()
    if count == 0:
        return []
    ranks = min(2, count)
    return [f"nproc={ranks}", f"layout.tensor={ranks}", "precision.dtype=bf16", "evaluate.verify_export=0"]


def build_digits(work: Path) -> Path:
    """The folder with data/ and base/, an untrained model; made where an earlier check has not."""
    folder = work / "digits"
    build = [sys.executable, "tools/build_digits.py", "--out", str(folder), *SIZES]
    subprocess.run(build, cwd=REPOSITORY, check=True)
    return folder


def made_digits(work: Path) -> Path:
    """`build_digits`, and in it sft/hf; made where an earlier check has not."""
    folder = build_digits(work)
    if not (folder / "sft" / "hf" / "config.json").is_file():
        words = (f"model.hf_dir={folder / 'base'}", f"train.steps={COLD_START_STEPS}", "train.batch_size=32")
        call("sft", "examples/quickstart/sft.yaml", folder, folder / "sft", *words)
    return folder


def command(name: str, config: str, digits: Path, run: Path, *words: str, on_cards: bool = True) -> list[str]:
    """A command of the project on the data of `digits`.

    Args:
        on_cards: give it `device_words`, before `words`.
    """
    return [
        *(sys.executable, "-m", "megatron_sr1.cli", name, config, f"run_dir={run}"),
        *(f"data.{part}=[{digits}/data/{part}-*.tar]" for part in ("train", "heldout", "cold_start")),
        *(device_words() if on_cards else ()),
        *words,
    ]


def call(name: str, config: str, digits: Path, run: Path, *words: str, on_cards: bool = True) -> float:
    """Runs `command` to its end, and returns the seconds it took.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is in the log.
    """
    start = time.perf_counter()
    subprocess.run(command(name, config, digits, run, *words, on_cards=on_cards), cwd=REPOSITORY, check=True)
    return time.perf_counter() - start


def metrics(run: Path) -> list[dict[str, float | None]]:
    """One entry for each step of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
