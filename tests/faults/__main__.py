"""python -m tests.faults --trials 30 --seed 1: disturbs real runs at random moments and says what came of it.

Each run is disturbed one to three times: a signal to a random process of it, in a random part of it, and perhaps damage
to its files; then the same command ends it, and everything is compared with a run that nobody disturbed, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.chain import Chains, Fault, Trial
from tests.faults.damage import DAMAGES
from tests.faults.moments import PARTS, Moments
from tests.workspace import Workspace, build_workspace

ROLES = ("launcher", "rank", "rank", "fork server", "grader", "resource tracker")
SIGNALS = (*[signal.SIGKILL] * 6, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
WORDS = (
    *("train.steps=6", "train.save_every=1", "train.evaluate_every=3", "evaluate.verify_export=12"),
    "watchdog.silent_seconds=10",
)
WHOLE = "whole"
BEGIN, END = "<!-- made by python -m tests.faults -->\n", "<!-- end -->\n"


def prepared(folder: Path) -> Chains:
    """A workspace with an undisturbed run."""
    workspace = Workspace(folder) if (folder / "sft" / "hf" / "config.json").exists() else build_workspace(folder)
    start = time.monotonic()
    started = Chains(workspace, WHOLE, WORDS, None).start(WHOLE, 0)
    parts = folder / WHOLE / "eval" / "parts"
    while started.process.poll() is None and not parts.exists():
        time.sleep(0.05)
    started_after = time.monotonic() - start
    if started.process.wait() != 0:
        sys.exit(f"the undisturbed run ended badly: {started.log}")
    started.close()
    return Chains(workspace, WHOLE, WORDS, Moments(workspace, WHOLE, started_after))


def drawn_faults(draw: random.Random, most: int) -> list[Fault]:
    """Of one run, in the order of its parts."""
    parts = sorted((draw.choice(PARTS) for _ in range(min(draw.randint(1, 3), most))), key=PARTS.index)
    found = []
    for part in parts:
        role, number = draw.choice(ROLES), draw.choice(SIGNALS)
        if number != signal.SIGKILL and role not in ("launcher", "rank"):
            number = signal.SIGKILL  # the others take no polite signal
        if number == signal.SIGSTOP:
            role = "rank"
        found.append(Fault(part, role, number, draw.choice(["", *DAMAGES])))
    return found


def _rows(trials: Sequence[Trial], kinds: Sequence[str], kind_of: dict[int, str]) -> list[str]:
    lines = []
    for kind in kinds:
        those = [trial for number, trial in enumerate(trials) if kind_of.get(number) == kind]
        if those:
            seconds = [trial.seconds for trial in those if trial.seconds is not None and not trial.went_on]
            longest = f"{max(seconds):.1f} s" if seconds else "the run goes on"
            lines.append(f"| {kind} | {len(those)} | {sum(not trial.wrong for trial in those)} | {longest} |")
    return lines


def table(trials: Sequence[Trial]) -> str:
    """Markdown: what was tried how often, how often it was survived, and how long the rest of a run took to end."""
    lines = ["| fault | tried | survived | longest until nothing was left |", "|---|---|---|---|"]
    signals = {n: f"{trial.fault.number.name} to the {trial.fault.role}" for n, trial in enumerate(trials)}
    lines += _rows(trials, sorted(set(signals.values())), signals)
    lines += _rows(
        trials, [f"during {part}" for part in PARTS], {n: f"during {t.fault.part}" for n, t in enumerate(trials)}
    )
    lines += _rows(trials, list(DAMAGES), {n: trial.fault.damage for n, trial in enumerate(trials)})
    good = sum(not trial.wrong for trial in trials)
    return "\n".join([*lines, f"| all | {len(trials)} | {good} | |"]) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keeps the runs; default: a temporary one")
    parser.add_argument("--page", type=Path, help="whose table is replaced by this one's: docs/reliability.md")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    chains = prepared(folder)
    trials: list[Trial] = []
    number = 0
    while len(trials) < args.trials:
        faults = drawn_faults(draw, args.trials - len(trials))
        for trial in chains.disturb(f"seed{args.seed}.{number}", faults, draw):
            trials.append(trial)
            print(json.dumps(asdict(trial)), flush=True)
        number += 1
    print(table(trials))
    if args.page:
        text = args.page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        made = f"\n{args.trials} trials, `--seed {args.seed}`, two ranks on two cores:\n\n{table(trials)}\n"
        args.page.write_text(before + BEGIN + made + END + rest.partition(END)[2], encoding="utf-8")
    sys.exit(1 if any(trial.wrong for trial in trials) else 0)


if __name__ == "__main__":
    main()
