"""Reads what a run leaves in its folder: config.yaml, metrics.jsonl, eval/<label>.json and eval/images/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.config import load_config

METRICS_FILE, CONFIG_FILE, EVAL_FOLDER = "metrics.jsonl", "config.yaml", "eval"


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
    """One run folder. `metrics` are the lines of metrics.jsonl; `evaluations` are in order of step."""

    path: Path
    preset: str
    config_text: str
    metrics: tuple[Mapping[str, float | None], ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        return self.path.name


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among `folders`; a folder that is no run stands for the runs directly inside it.

    Raises:
        ValueError: no run in one of the folders.
    """
    found: list[Path] = []
    for folder in folders:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        runs = [folder] if _is_run(folder) else [child for child in inside if _is_run(child)]
        if not runs:
            raise ValueError(
                f"{folder} holds no run: neither it nor a folder in it has {METRICS_FILE} or {EVAL_FOLDER}/*.json. "
                "Give the run_dir of a finished or running command."
            )
        found += runs
    return found


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or any((folder / EVAL_FOLDER).glob("*.json"))


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
        preset=load_config(config_file, []).objective.preset if config_file.is_file() else "",
        config_text=config_file.read_text(encoding="utf-8") if config_file.is_file() else "",
        metrics=tuple(_read_metrics(metrics_file)) if metrics_file.is_file() else (),
        evaluations=tuple(sorted(evaluations, key=lambda e: (e.step, e.label != "before", e.label))),
    )


def _read_metrics(path: Path) -> list[dict[str, float | None]]:
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a line still being written has no newline yet
    return [_parse(path, number, line) for number, line in enumerate(whole_lines, start=1)]


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is not JSON: {error}. Repair or remove it.") from error


def _read_evaluation(run_path: Path, path: Path) -> Evaluation:
    tree = _parse(path, 1, path.read_text(encoding="utf-8"))
    try:
        return Evaluation(
            label=tree["label"],
            step=tree["step"],
            summary=tree["summary"],
            by_source=tree["by_source"],
            examples=tuple(_example(run_path, example) for example in tree["examples"]),
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the key {error}. Evaluate again with this release.") from error


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
