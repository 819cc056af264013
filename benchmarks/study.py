"""The study: nine objectives from one cold start on digits, three seeds each, with what each of them costs.

    make study                                    # hours on two cores; started again it goes on where it was
    python -m benchmarks.study --short            # the same in minutes: three objectives, two steps, one seed

It builds pictures with several questions each (`tools/build_digits.py --questions 3`), trains the cold start, then the
sweep, one seed after another, so that objectives have as many seeds as each other wherever it is stopped. Of each
finished run the dependency of its tokens on the image is graded (`benchmarks.dependency`: the last step's responses,
the trained weights); at the end `benchmarks.step_cost` weighs a step of each objective, and of one whose reader is a
server, alone on the machine. FOLDER/study.md has the tables, FOLDER/runs/report.html the curves. What they say and what
they cannot say is in docs/study.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.step_cost import Cost, table
from megatron_sr1.launch.sweep import Sweep, read_sweep, state_of
from tools.build_digits import main as build_digits

EXAMPLES = Path("examples/study")
COLUMNS = (  # (measure, title, what it is multiplied by, digits)
    ("accuracy", "accuracy", 100, 1),
    ("second_pass_accuracy", "second pass", 100, 1),
    ("sufficiency", "sufficiency", 100, 1),
    ("other_question_accuracy", "other question", 100, 1),
    ("language_shortcut_rate", "LSR", 100, 1),
    ("faithful", "faithful", 100, 1),
    ("leak", "leak", 100, 1),
    ("measures/dependency_auc", "dependency AUC", 1, 3),
    ("first/response_tokens", "tokens", 1, 1),
    ("seconds/step", "seconds", 1, 2),
)


@dataclass(frozen=True)
class Plan:
    """Either form of the study."""

    folder: Path
    sweep: Path
    samples: tuple[int, int, int]  # train, heldout, demonstrations
    cold_start: tuple[str, ...]  # further overrides
    costs: tuple[int, int]  # steps and rounds

    @property
    def cost_file(self) -> Path:
        """What a step costs, once that is weighed."""
        return self.folder / "costs.json"


FULL = Plan(Path("runs/study"), EXAMPLES / "sweep.yaml", (4000, 600, 8000), (), (10, 2))
SHORT = Plan(
    Path("runs/study_short"),
    EXAMPLES / "short.yaml",
    (48, 12, 160),
    ("train.steps=4", "preflight.enabled=false"),
    (3, 1),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the same in minutes")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--no-costs", action="store_true", help="leave out what a step costs")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: it must be 1 or more.")
    plan = SHORT if options.short else FULL
    sweep = read_sweep(plan.sweep)
    _cold_start(plan)
    failed = list(_runs(plan, sweep, options.jobs))
    failed += _measure(sweep)
    if not options.no_costs and not any(failed) and not plan.cost_file.is_file():
        failed.append(subprocess.run(_costs(plan, sweep), check=False).returncode)
    _sr1("report", str(plan.sweep)).check_returncode()
    (plan.folder / "study.md").write_text(study_tables(plan, sweep), encoding="utf-8")
    print((plan.folder / "study.md").read_text(encoding="utf-8"))
    sys.exit(1 if any(failed) else 0)


def _cold_start(plan: Plan) -> None:
    train, heldout, demonstrations = map(str, plan.samples)
    words = ["--train", train, "--heldout", heldout, "--demonstrations", demonstrations]
    build_digits(["--questions", "3", "--out", str(plan.folder), *words])
    if not (plan.folder / "sft" / "hf" / "config.json").is_file():
        config, own = str(EXAMPLES / "sft.yaml"), f"run_dir={plan.folder}/sft"
        there = [f"model.hf_dir={plan.folder}/base", f"data.cold_start=[{plan.folder}/data/cold_start-*.tar]"]
        there.append(f"data.heldout=[{plan.folder}/data/heldout-*.tar]")
        _sr1("sft", config, own, *there, *plan.cold_start).check_returncode()


def _runs(plan: Plan, sweep: Sweep, jobs: int) -> Iterator[int]:
    """The status of the sweep for each seed; one that fails keeps no other from being tried."""
    for seed in dict.fromkeys(run.seed for run in sweep.runs):
        names = [run.name for run in sweep.runs if run.seed == seed]
        yield _sr1("sweep", str(plan.sweep), "--jobs", str(jobs), "--only", *names).returncode


def _sr1(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "megatron_sr1.cli", *words], check=False)


def _measure(sweep: Sweep) -> list[int]:
    """The status for each run that is finished and not measured yet."""
    found = []
    for run in sweep.runs:
        folder = Path(run.run_dir)
        if state_of(sweep, run) != "finished" or "dependency_auc" in _json(folder / "measures.json"):
            continue
        step = sweep.config_of(run).train.steps - 1
        words = ["--run", str(folder), "--model", str(folder / "hf"), "--step", str(step), "--contrasts", "no image"]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.dependency", "--measures", *words]
        found.append(subprocess.run(command, check=False).returncode)
    return found


def _costs(plan: Plan, sweep: Sweep) -> list[str]:
    """The command that weighs steps."""
    steps, rounds = map(str, plan.costs)
    presets = [*dict.fromkeys(run.preset for run in sweep.runs), "external_reasoner"]
    words = ["--presets", *presets, "--steps", steps, "--rounds", rounds, "--out", str(plan.cost_file)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_cost", sweep.config, *words]
    shared = _shared(sweep)
    return [*command, "--overrides", *shared] if shared else command


def _shared(sweep: Sweep) -> list[str]:
    """Overrides of every run, but for what the sweep sets for each."""
    own = ("objective.preset=", "seed=", "run_dir=", "train.steps=")
    return [word for word in sweep.runs[0].overrides if not word.startswith(own)]


def study_tables(plan: Plan, sweep: Sweep) -> str:
    """Markdown: means with spread, paired differences to the first, and costs if there are any."""
    rows = json.loads((Path(sweep.runs[0].run_dir).parent / "sweep.json").read_text())
    blocks = [
        "Mean ± sample standard deviation over the seeds; shares in %, of the held-out prompts, or of the samples that "
        "a control was asked for:\n\n" + _table(rows, "after", "std"),
        f"Paired differences to {rows[0]['group']} over common seeds, mean ± standard error:\n\n"
        + _table(rows[1:], "paired_differences_to_the_first", "error"),
    ]
    unfinished = [name for row in rows for name in row["unfinished"]]
    if unfinished:
        blocks.append(f"Not in the numbers, because unfinished: {', '.join(unfinished)}.")
    costs = _json(plan.cost_file)
    if costs:
        found = {name: [Cost(**one) for one in each] for name, each in costs.items()}
        blocks.append("What a step costs:\n\n" + table(found))
    return "\n\n".join(blocks) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], key: str, spread: str) -> str:
    start = [row["before"] for row in rows if row.get("before")] if key == "after" else []
    lines = ["| objective | seeds | " + " | ".join(title for _, title, _, _ in COLUMNS) + " |"]
    lines.append("|---|---:|" + "---:|" * len(COLUMNS))
    if start:
        lines.append(
            "| before | | " + " | ".join(_cells({k: v | {"std": None} for k, v in start[0].items()}, spread)) + " |"
        )
    for row in rows:
        if row[key]:
            most = max(value["num"] for value in row[key].values())
            lines.append(f"| {row['group']} | {most} | " + " | ".join(_cells(row[key], spread, key != "after")) + " |")
    return "\n".join(lines)


def _cells(values: Mapping[str, Any], spread: str, signed: bool = False) -> Iterator[str]:
    for name, _, scale, digits in COLUMNS:
        if name not in values:
            yield "–"
            continue
        mean, wide = values[name]["mean"], values[name].get(spread)
        text = f"{scale * mean:{'+' if signed else ''}.{digits}f}"
        yield text if wide is None else f"{text} ± {scale * wide:.{digits}f}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    main()
