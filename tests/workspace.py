"""A folder with tiny shards, an untrained model and a short cold start, and the commands that run in it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.commands import REPOSITORY, call_forked, run_forked
from tests.tool_modules import load_tool

RUN_TIMEOUT = 600  # seconds
PHASES = {  # a part of a GRPO step, as its seconds are called -> the phase of the memory plan that it is
    "save": "checkpoint",
    "sync": "weight sync",
    "rollout": "rollout",
    "reward": "rollout",
    "train": "training",
}
TIMED = ("seconds/", "tokens_per_second", "trained_tokens_per_second", "memory/")  # metrics that differ from run to run


@dataclass(frozen=True)
class Workspace:
    """A folder with tiny shards, an untrained model and a short cold start."""

    folder: Path

    def command(self, name: str, run: str, *overrides: str) -> list[str]:
        data = self.folder / "data"
        hf_dir = self.folder / ("base" if name == "sft" else "sft/hf")
        return [
            *(sys.executable, "-m", "megatron_sr1.cli", name, str(REPOSITORY / "examples/quickstart/grpo.yaml")),
            f"run_dir={self.folder / run}",
            f"model.hf_dir={hf_dir}",
            *(f"data.{part}=[{data}/{part}-*.tar]" for part in ("train", "heldout", "cold_start")),
            *("rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "train.batch_size=4"),
            *("preflight.enabled=false",) * (name in ("sft", "grpo")),  # it has tests of its own
            *("train.micro_batch_tokens=1024", "optimizer.lr=2e-4", "evaluate.verify_export=0"),
            # drawn anew for each step, so that whoever resumes or replays must draw the same
            *(["objective.contrast=[{name: masked, context: masked}]"] if name in ("grpo", "preflight") else []),
            *overrides,
        ]

    def run(self, name: str, run: str, *overrides: str) -> str:
        """Runs to the end and returns what it printed."""
        done = subprocess.run(
            self.command(name, run, *overrides),
            cwd=REPOSITORY,
            timeout=RUN_TIMEOUT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def run_forked(self, name: str, run: str, *overrides: str, num_ranks: int = 2) -> str:
        """As `run`, in processes that have imported what the command needs; `num_ranks` as its `nproc`."""
        return run_forked(self.command(name, run, *overrides), num_ranks)

    def metrics(self, run: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def summary(self, run: str, label: str) -> dict[str, float]:
        return json.loads((self.folder / run / "eval" / f"{label}.json").read_text())["summary"]


def build_workspace(folder: Path) -> Workspace:
    """Draws the data and trains the cold start."""
    sizes = ["--train", "40", "--heldout", "12", "--demonstrations", "400"]
    call_forked(_build_digits, ["--out", str(folder), *sizes])
    made = Workspace(folder)
    one_rank = ("nproc=1", "layout.tensor=1")  # two would spend half of the time on each other
    learn = (
        *("train.steps=null", "train.epochs=4.8"),
        "train.batch_size=32",
        "optimizer.lr=3e-3",
        "train.save_every=60",
    )
    made.run_forked("sft", "sft", *learn, *one_rank, num_ranks=1)
    return made


def _build_digits(words: list[str]) -> None:
    load_tool("build_digits").main(words)


def untimed(entries: list[dict[str, float]]) -> list[dict[str, float]]:
    """The metrics that must be equal from run to run."""
    return [{name: value for name, value in entry.items() if not name.startswith(TIMED)} for entry in entries]
