"""A sweep as numbers: runs that differ in their seed alone are a group, and a group is a row of the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sr1.config import load_config
from megatron_sr1.config.length import known_steps
from megatron_sr1.report.controls_section import CONTROL_COLUMNS
from megatron_sr1.report.runs import CONFIG_FILE, Evaluation, ReportedRun, read_run
from megatron_sr1.report.summary_table import COLUMNS
from megatron_sr1.report.sweep.statistics import Estimate, PairedDifference, estimate, paired_difference

MEASURED = "measures/"  # before the names of measures.json
LAST_STEPS = 10  # training numbers are means over as many steps, the last
AVERAGED = ("first/response_tokens", "second/response_tokens", "loss/sft/nll")  # of them, beside the rewards
# of a step, in a row
STAGES = ("seconds/save", "seconds/sync", "seconds/rollout", "seconds/reward", "seconds/train", "seconds/step")


@dataclass(frozen=True)
class RunGroup:
    """Run folders by seed. A folder that does not exist yet counts as a run that has not begun."""

    preset: str
    variant: str  # "" where there is none
    runs: Mapping[int, Path]

    @property
    def label(self) -> str:
        return f"{self.preset}-{self.variant}" if self.variant else self.preset


@dataclass(frozen=True)
class Measure:
    """One number of a finished run."""

    key: str
    title: str
    meaning: str
    scale: float = 1.0  # shown is scale * value
    digits: int = 3


@dataclass(frozen=True)
class GroupRow:
    """One group: estimates over its finished runs, by measure."""

    label: str
    preset: str
    variant: str
    runs: Mapping[int, ReportedRun]  # those with a step, by seed
    unfinished: tuple[str, ...]  # runs that are not in the numbers, and how far they are
    per_seed: Mapping[int, Mapping[str, float]]
    before_per_seed: Mapping[int, Mapping[str, float]]
    differences: Mapping[str, PairedDifference]  # to the first group of the table; nothing for that one

    @property
    def after(self) -> Mapping[str, Estimate]:
        """Estimates of finished runs."""
        return _estimates(self.per_seed)

    @property
    def before(self) -> Mapping[str, Estimate]:
        """Estimates of their starting points."""
        return _estimates(self.before_per_seed)


SHARES = tuple(Measure(column.key, column.title, column.meaning, scale=100, digits=1) for column in COLUMNS)
CONTROLS = tuple(
    Measure(key, title, meaning, scale=100, digits=1)
    for key, title, meaning in CONTROL_COLUMNS
    if key not in [measure.key for measure in SHARES]
)
LENGTHS_AND_TIME = (
    Measure("first/response_tokens", "first pass, tokens", "length of the first response", digits=1),
    Measure("second/response_tokens", "second pass, tokens", "length of the second response", digits=1),
    Measure(
        "seconds/step",
        "seconds a step",
        "checkpoint, weight sync, rollout, grading and training; median of all steps",
        digits=2,
    ),
)


def sweep_rows(groups: Sequence[RunGroup]) -> list[GroupRow]:
    """Reads the runs; one row per group, in order.

    Raises:
        ValueError: a damaged file in a run folder.
    """
    rows: list[GroupRow] = []
    for group in groups:
        runs = {seed: read_run(path) for seed, path in group.runs.items() if path.is_dir()}
        begun = {seed: run for seed, run in runs.items() if run.metrics}
        progress = {seed: _progress(begun[seed]) if seed in begun else (0, None) for seed in group.runs}
        done = {seed: begun[seed] for seed, (step, steps) in progress.items() if step == steps}
        unfinished = tuple(
            f"{group.runs[seed].name} ({'not begun' if steps is None else f'{step} of {steps} steps'})"
            for seed, (step, steps) in progress.items()
            if seed not in done
        )
        per_seed = {seed: measured(run) for seed, run in done.items()}
        base = rows[0].per_seed if rows else {}
        rows.append(
            GroupRow(
                label=group.label,
                preset=group.preset,
                variant=group.variant,
                runs=begun,
                unfinished=unfinished,
                per_seed=per_seed,
                before_per_seed={seed: _shares(_evaluation(run, "before")) for seed, run in done.items()},
                differences=_differences(per_seed, base),
            )
        )
    return rows


def measured(run: ReportedRun) -> dict[str, float]:
    """The numbers of a finished run by key of their measure: the evaluation after training; means over the last
    LAST_STEPS steps of rewards and lengths; the median step's seconds; measures.json, as `measures/<name>`."""
    last = run.metrics[-LAST_STEPS:]
    names = {name for entry in last for name in entry if name.startswith("reward/") or name in AVERAGED}
    values = {name: [value for entry in last if (value := entry.get(name)) is not None] for name in sorted(names)}
    seconds = [sum(entry.get(stage) or 0.0 for stage in STAGES) for entry in run.metrics]
    means = {name: statistics.fmean(found) for name, found in values.items() if found}
    others = {f"{MEASURED}{name}": value for name, value in run.measures.items() if value is not None}
    return {**_shares(_evaluation(run, "after")), **means, "seconds/step": statistics.median(seconds), **others}


def training_measures(rows: Sequence[GroupRow]) -> list[Measure]:
    """What the rows know of the last training steps: total reward and loss first, its components, lengths, time; then
    what else was measured of the runs."""
    known = {key for row in rows for values in row.per_seed.values() for key in values}
    rewards = sorted((key for key in known if key.startswith("reward/")), key=lambda key: (key != "reward/total", key))
    measures = [Measure(key, key, f"mean {key.partition('/')[2]} reward of the rollouts") for key in rewards]
    others = sorted(key for key in known if key.startswith(MEASURED))
    outside = [Measure(key, key.removeprefix(MEASURED), "of measures.json in the run's folder") for key in others]
    loss = Measure("loss/sft/nll", "loss", "negative log-likelihood of the demonstrations, nats per token")
    return [measure for measure in (loss, *measures, *LENGTHS_AND_TIME, *outside) if measure.key in known]


def common_start(rows: Sequence[GroupRow]) -> bool:
    """Whether there was an evaluation before training, the same for every finished run."""
    starts = [values for row in rows for values in row.before_per_seed.values()]
    return any(starts) and all(values == starts[0] for values in starts)


def _progress(run: ReportedRun) -> tuple[int, int | None]:
    """Steps done, and steps of the whole run."""
    steps = known_steps(run.path, load_config(run.path / CONFIG_FILE, []))
    return int(run.metrics[-1]["step"] or 0) + 1, steps


def _evaluation(run: ReportedRun, label: str) -> Evaluation | None:
    return next((evaluation for evaluation in run.evaluations if evaluation.label == label), None)


def _shares(evaluation: Evaluation | None) -> dict[str, float]:
    summary = {} if evaluation is None else evaluation.summary
    return {m.key: value for m in (*SHARES, *CONTROLS) if (value := summary.get(m.key)) is not None}


def _estimates(per_seed: Mapping[int, Mapping[str, float]]) -> dict[str, Estimate]:
    keys = dict.fromkeys(key for values in per_seed.values() for key in values)
    return {key: estimate([values[key] for values in per_seed.values() if key in values]) for key in keys}


def _differences(
    per_seed: Mapping[int, Mapping[str, float]], base: Mapping[int, Mapping[str, float]]
) -> dict[str, PairedDifference]:
    found = {}
    for key in dict.fromkeys(key for values in per_seed.values() for key in values):
        difference = paired_difference(_of(per_seed, key), _of(base, key))
        if difference is not None:
            found[key] = difference
    return found


def _of(per_seed: Mapping[int, Mapping[str, float]], key: str) -> dict[int, float]:
    return {seed: values[key] for seed, values in per_seed.items() if key in values}
