"""python -m tests.faults --trials 30 --seed 1: kills real runs at random moments and says what came of it.

Each run is killed one to three times: a random process of it, in a random part of it; then the same command ends it,
and everything is compared with a run that nobody disturbed, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.faults.chain import Chains, Trial
from tests.faults.moments import PARTS, Moments
from tests.workspace import Workspace, build_workspace

ROLES = ("launcher", "rank", "rank", "fork server", "grader", "child of a grader", "resource tracker")
WORDS = ("train.steps=6", "train.save_every=1", "train.evaluate_every=3", "evaluate.verify_export=12")
WHOLE = "whole"


def prepared(folder: Path) -> tuple[Workspace, Chains]:
    """A workspace with an undisturbed run."""
    workspace = Workspace(folder) if (folder / "sft" / "hf" / "config.json").exists() else build_workspace(folder)
    start = time.monotonic()
    chains = Chains(workspace, WHOLE, WORDS, None)  # type: ignore[arg-type]
    started = chains.start(WHOLE, 0)
    parts = folder / WHOLE / "eval" / "parts"
    while started.process.poll() is None and not parts.exists():
        time.sleep(0.05)
    started_after = time.monotonic() - start
    if started.process.wait() != 0:
        sys.exit(f"the undisturbed run ended badly: {started.log}")
    started.close()
    return workspace, Chains(workspace, WHOLE, WORDS, Moments(workspace, WHOLE, started_after))


def table(trials: list[Trial]) -> str:
    """Markdown: what was killed when, how often, and how long the rest took to end."""
    lines = ["| killed | in | trials | survived | longest until nothing was left |", "|---|---|---|---|---|"]
    kinds = Counter((trial.role, trial.part) for trial in trials)
    for (role, part), count in sorted(kinds.items(), key=lambda item: (item[0][0], PARTS.index(item[0][1]))):
        those = [trial for trial in trials if (trial.role, trial.part) == (role, part)]
        seconds = [trial.seconds for trial in those if trial.seconds is not None and not trial.went_on]
        longest = f"{max(seconds):.1f} s" if seconds else "the run goes on"
        lines.append(f"| {role} | {part} | {count} | {sum(not trial.wrong for trial in those)} | {longest} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the runs; default: a temporary one")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    _, chains = prepared(folder)
    trials: list[Trial] = []
    number = 0
    while len(trials) < args.trials:
        count = min(draw.randint(1, 3), args.trials - len(trials))
        parts = sorted((draw.choice(PARTS) for _ in range(count)), key=PARTS.index)
        faults = [(part, draw.choice(ROLES)) for part in parts]
        run = f"seed{args.seed}.{number}"
        number += 1
        for trial in chains.disturb(run, faults, draw):
            trials.append(trial)
            print(json.dumps(asdict(trial)), flush=True)
    print(table(trials))
    bad = [trial for trial in trials if trial.wrong]
    print(f"{len(trials)} faults tried, {len(trials) - len(bad)} survived")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
