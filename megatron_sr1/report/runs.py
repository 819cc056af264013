"""Reads what a run leaves in its folder: config.yaml, metrics.jsonl, eval/<label>.json and eval/images/; and
measures.json, where something else has measured the run: {name: number}."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_sr1.config import load_config

Kind = TypeVar("Kind")
METRICS_FILE, CONFIG_FILE, MEASURES_FILE = "metrics.jsonl", "config.yaml", "measures.json"
EVAL_FOLDER, ROLLOUTS_FOLDER = "eval", "rollouts"


@dataclass(frozen=True)
class Example:
    """One held-out question with both passes. `images` are files under the run folder."""

    key: str
    problem: str
    answer: str
    images: tuple[Path, ...]
    first: str
    second: str | None
    description: str | None
    rewards: Mapping[str, float]
    faithful: bool | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run: `label` is before, after, step-50 ..."""

    label: str
    step: int
    summary: Mapping[str, float | None]
    by_source: Mapping[str, Mapping[str, float | None]]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class ReportedRun:
    """One run folder. `metrics` are the lines of metrics.jsonl; `evaluations` are in order of step; `measures` are the
    numbers of measures.json by name."""

    path: Path
    preset: str
    config_text: str
    metrics: tuple[Mapping[str, float | None], ...]
    evaluations: tuple[Evaluation, ...]
    measures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among `folders`, each once; a folder that is no run stands for the runs directly inside it.

    Raises:
        ValueError: no run in one of the folders.
    """
    found: dict[Path, Path] = {}  # by where it really is
    for folder in folders:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        runs = [folder] if _is_run(folder) else [child for child in inside if _is_run(child)]
        if not runs:
            raise ValueError(
                f"{folder} holds no run: neither it nor a folder in it has {METRICS_FILE}, {EVAL_FOLDER}/*.json or "
                f"{ROLLOUTS_FOLDER}/step_*. "
                "Give the run_dir of a finished or running command."
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _is_run(folder: Path) -> bool:
    """Also one that has not ended its first step."""
    found = (folder / METRICS_FILE).is_file() or any((folder / EVAL_FOLDER).glob("*.json"))
    return found or any((folder / ROLLOUTS_FOLDER).glob("step_*.jsonl*"))


def read_run(path: Path) -> ReportedRun:
    """Reads one run folder; a file the run has not written yet counts as empty.

    Raises:
        ValueError: a file that is damaged; the message names it.
        ConfigError: config.yaml is not a configuration of this release.
    """
    config_file, metrics_file = path / CONFIG_FILE, path / METRICS_FILE
    evaluations = [_read_evaluation(path, file) for file in (path / EVAL_FOLDER).glob("*.json")]
    return ReportedRun(
        path=path,
        preset=load_config(config_file, []).objective.name if config_file.is_file() else "",
        config_text=config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
        metrics=tuple(_read_metrics(metrics_file)) if metrics_file.is_file() else (),
        evaluations=tuple(sorted(evaluations, key=lambda e: (e.step, e.label != "before", e.label))),
        measures=_read_measures(path / MEASURES_FILE),
    )


def _read_measures(path: Path) -> dict[str, float | None]:
    values = _parse(path, 1, _text(path)) if path.is_file() else {}
    wrong = next((name for name, value in values.items() if not _is_number(value) or _is_infinite(value)), None)
    if wrong is not None:
        raise ValueError(f"{path} has {wrong}={values[wrong]!r}, which is no finite number. Repair or remove it.")
    return values


def _is_infinite(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _read_metrics(path: Path) -> list[dict[str, float | None]]:
    whole_lines = _text(path).split("\n")[:-1]  # a line still being written has no newline yet
    return [_metrics(path, number, line) for number, line in enumerate(whole_lines, start=1)]


def _metrics(path: Path, number: int, line: str) -> dict[str, float | None]:
    values = _parse(path, number, line)
    wrong = next((name for name, value in values.items() if not _is_number(value)), None)
    if wrong is not None or "step" not in values:
        what = "has no step" if wrong is None else f"has {wrong}={values[wrong]!r}, which is no number"
        raise ValueError(f"{path}:{number} {what}. Repair or remove it.")
    return values


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}). Repair or remove it.") from error


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}:{number} is not JSON: {error}. Repair or remove it.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}:{number} holds a {type(tree).__name__}, not an object. Repair or remove it.")
    return tree


def _read_evaluation(run_path: Path, path: Path) -> Evaluation:
    tree = _parse(path, 1, _text(path))
    try:
        evaluation = Evaluation(
            label=_of(str, tree, "label"),
            step=_of(int, tree, "step"),
            summary=_of(dict, tree, "summary"),
            by_source=_of(dict, tree, "by_source"),
            examples=tuple(_example(run_path, example) for example in _of(list, tree, "examples")),
        )
        for numbers in (evaluation.summary, *evaluation.by_source.values()):
            wrong = [name for name, value in numbers.items() if not _is_number(value)]
            if wrong:
                raise TypeError(f"{wrong[0]}={numbers[wrong[0]]!r} is no number")
        if evaluation.label != path.stem:
            raise ValueError(
                f"{path} calls itself {evaluation.label!r}, so it is not the file of that evaluation. Give it its "
                "own name back, or remove it."
            )
    except KeyError as error:
        raise ValueError(f"{path} lacks the key {error}. Evaluate again with this release.") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Evaluate again with this release.") from error
    return evaluation


def _of(kind: type[Kind], tree: Mapping[str, Any], name: str) -> Kind:
    """Raises KeyError or TypeError where it is missing or of another kind."""
    value = tree[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _example(run_path: Path, tree: dict[str, Any]) -> Example:
    images = tuple(run_path / name for name in tree["images"])
    for image in images:
        if not image.resolve().is_relative_to(run_path.resolve()):
            raise ValueError(f"example {tree['key']!r}: image {image} lies outside the run folder {run_path}.")
        if not image.is_file():
            raise ValueError(f"example {tree['key']!r}: image {image} is missing. Evaluate again.")
    return Example(
        key=tree["key"],
        problem=tree["problem"],
        answer=tree["answer"],
        images=images,
        first=tree["first"],
        second=tree["second"],
        description=tree["description"],
        rewards=tree["rewards"],
        faithful=tree["faithful"],
    )
