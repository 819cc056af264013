"""What is launched: tasks that wait for each other. Read from an experiment file, a sweep file or one configuration.

    name: digits
    tasks:
      - {name: cold-start, command: sft, config: examples/quickstart/sft.yaml, overrides: [train.steps=60]}
      - {name: grpo, command: grpo, config: examples/quickstart/grpo.yaml, after: [cold-start]}
      - {name: convert, command: convert, arguments: [hf-to-megatron, --hf, runs/a/hf, --out, runs/a/megatron]}
      - {name: presets, sweep: examples/sweep.yaml, after: [cold-start]}

A task is a command of megatron-sr1 with its configuration, overrides and further
arguments, or a sweep, which is as many runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_sr1.config import ConfigError, home_path, load_config, read_mapping

RANK_COMMANDS = ("sft", "grpo", "evaluate")  # they run on many ranks, by their configuration
COMMANDS = (*RANK_COMMANDS, "convert", "report")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")  # a part of the names of files, jobs and containers


@dataclass(frozen=True)
class Step:
    """One process tree: the words after `megatron-sr1`."""

    name: str
    command: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A job, or for a sweep an array of them."""

    name: str
    steps: tuple[Step, ...]  # one; of a sweep one per run, independent of each other
    after: tuple[str, ...] = ()  # names of tasks that must have succeeded

    @property
    def on_ranks(self) -> bool:
        """Whether it takes all ranks, or one process."""
        return self.steps[0].command in RANK_COMMANDS


@dataclass(frozen=True)
class Experiment:
    """Tasks in an order in which each comes after those it waits for."""

    name: str
    tasks: tuple[Task, ...]


def read_experiment(path: Path, command: str | None, overrides: Sequence[str], num_ranks: int | None) -> Experiment:
    """Reads what `path` is: an experiment (has `tasks`), a sweep (has `config`), or a configuration for `command`.

    Every configuration is loaded with its overrides, so that a mistake is told here and not by a cluster later.

    Args:
        overrides: key=value for a configuration; the other files have their own.
        num_ranks: `nproc` of every task that runs on ranks; None: as configured.

    Raises:
        ConfigError: names the file, the task and what is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"CONFIG={str(path)!r} is not a file. Give an experiment, a sweep or a configuration.")
    tree: Any = OmegaConf.to_container(read_mapping(path))
    keys = set(tree)
    if not keys & {"tasks", "config"}:
        if command not in RANK_COMMANDS:
            raise ConfigError(f"{path} is a configuration: say what for by --command {'|'.join(RANK_COMMANDS)}.")
        name = re.sub(r"[^a-z0-9-]+", "-", path.stem.lower()).strip("-") or command
        task = _task({"name": name, "command": command, "config": str(path), "overrides": list(overrides)}, path)
        experiment = Experiment(name, (task,))
    elif command is not None or overrides:
        raise ConfigError(f"{path} says itself what runs: leave --command and key=value out, or write them into it.")
    elif "tasks" in keys:
        experiment = _read_tasks(tree, path)
    else:
        name = re.sub(r"[^a-z0-9-]+", "-", path.stem.lower()).strip("-") or "sweep"
        experiment = Experiment(name, (_task({"name": name, "sweep": str(path)}, path),))
    return _with_ranks(experiment, path, num_ranks)


@dataclass(frozen=True)
class _TaskEntry:
    """The keys of a task."""

    name: str = ""
    command: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    sweep: str = ""
    after: tuple[str, ...] = ()


def _read_tasks(tree: dict[str, Any], path: Path) -> Experiment:
    strange = set(tree) - {"name", "tasks"}
    if strange:
        raise ConfigError(f"{path}: {', '.join(sorted(strange))} is not allowed. Keys of an experiment: name, tasks.")
    name, entries = tree.get("name", ""), tree["tasks"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: name={name!r} must be of small letters, digits and '-'.")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{path}: tasks must be a list of tasks, each with a name and a command or a sweep.")
    tasks: list[Task] = []
    for entry in entries:
        task = _task(entry, path)
        known = [other.name for other in tasks]
        if task.name in known:
            raise ConfigError(f"{path}: two tasks are named {task.name}.")
        missing = [other for other in task.after if other not in known]
        if missing:
            raise ConfigError(f"{path}, task {task.name}: after={missing[0]} names no task above it.")
        tasks.append(task)
    return Experiment(name, tuple(tasks))


def _task(entry: dict[str, Any], path: Path) -> Task:
    where = f"{path}, task {entry.get('name', '')}"
    known = [key.name for key in fields(_TaskEntry)]
    for key, value in entry.items():
        if key not in known:
            raise ConfigError(f"{where}: {key} is not allowed. Keys of a task: {', '.join(known)}.")
        default = getattr(_TaskEntry, key)
        is_list = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if not (is_list if isinstance(default, tuple) else isinstance(value, str)):
            kind = "a list of texts" if isinstance(default, tuple) else "a text"
            raise ConfigError(f"{where}: {key}={value!r} is not allowed: it must be {kind}.")
    words: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    words |= {key: home_path(f"{where}: {key}", words[key]) for key in ("config", "sweep") if key in words}
    task = _TaskEntry(**words)
    if not _NAME.fullmatch(task.name):
        raise ConfigError(f"{path}: the task's name {task.name!r} must be of small letters, digits and '-'.")
    if task.sweep:
        if task.command or task.config or task.overrides or task.arguments:
            raise ConfigError(f"{where}: a sweep says itself what runs. Leave command, config and the like out.")
        from megatron_sr1.launch.sweep import read_sweep

        sweep = read_sweep(Path(task.sweep))
        runs = [Step(run.name, sweep.command, (sweep.config, *run.overrides)) for run in sweep.runs]
        return Task(task.name, tuple(runs), task.after)
    if task.command not in COMMANDS:
        raise ConfigError(f"{where}: command={task.command!r} is not allowed: it must be one of {', '.join(COMMANDS)}.")
    if bool(task.config) != (task.command in RANK_COMMANDS) or (task.overrides and not task.config):
        raise ConfigError(f"{where}: {', '.join(RANK_COMMANDS)} take a config and overrides; others only arguments.")
    config = (task.config,) if task.config else ()
    return Task(task.name, (Step(task.name, task.command, (*config, *task.overrides, *task.arguments)),), task.after)


def _with_ranks(experiment: Experiment, path: Path, num_ranks: int | None) -> Experiment:
    """With every configuration loaded, and `nproc` as the executor will have it."""
    tasks = []
    for task in experiment.tasks:
        steps = []
        for step in task.steps:
            ranks = () if num_ranks is None or not task.on_ranks else (f"nproc={num_ranks}",)
            is_run = step.command == "evaluate" and not step.words[0].endswith(
                (".yaml", ".yml")
            )  # made by a task above
            if task.on_ranks and not is_run:
                overrides = [word for word in (*step.words[1:], *ranks) if "=" in word and not word.startswith("-")]
                try:
                    load_config(step.words[0], overrides)
                except ConfigError as error:
                    raise ConfigError(f"{path}, task {step.name}: {error}") from error
            steps.append(Step(step.name, step.command, (*step.words, *ranks)))
        tasks.append(Task(task.name, tuple(steps), task.after))
    return Experiment(experiment.name, tuple(tasks))
