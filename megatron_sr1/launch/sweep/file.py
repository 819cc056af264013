"""A sweep file: presets x variants x seeds of one configuration, each combination a run with a folder of its own.

    command: grpo                          # sft or grpo
    config: examples/quickstart/grpo.yaml  # from where the command is started, as every path
    run_dir: runs/ablation                 # a run's folder is <run_dir>/<name>
    presets: [see_think, vision_sr1]       # objective.preset; none: the configuration's own
    seeds: [1, 2]                          # none: the configuration's own
    overrides: [train.steps=120]           # key=value, of every run
    variants: {lr_low: [optimizer.lr=5e-7], lr_high: [optimizer.lr=2e-6]}   # further overrides; none: one, without name

A run is named preset[-variant]-seed<N>.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_sr1.config import Command, Config, ConfigError, home_path, load_config, read_mapping, read_overrides
from megatron_sr1.config.checks import check_train_batch
from megatron_sr1.config.yaml_files import gives_list

COMMANDS: tuple[Command, ...] = ("sft", "grpo")
OWN_KEYS = ("run_dir", "seed", "objective.preset")  # the sweep sets them for each run
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")  # a part of a folder's name


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str  # preset[-variant]-seed<N>
    preset: str
    variant: str  # "" where the sweep has none
    seed: int
    run_dir: str
    overrides: tuple[str, ...]  # all key=value of `megatron-sr1 <command> <config>`, run_dir and seed included


@dataclass(frozen=True)
class Sweep:
    """Runs of one command with one configuration file, in the order presets, variants, seeds."""

    command: Command  # sft | grpo
    config: str
    run_dir: str
    runs: tuple[SweepRun, ...]

    def config_of(self, run: SweepRun) -> Config:
        """The resolved configuration of one of the runs."""
        return load_config(self.config, list(run.overrides))


@dataclass(frozen=True)
class _SweepFile:
    """The keys of a sweep file."""

    command: Command = "grpo"
    config: str = ""
    run_dir: str = ""
    presets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    overrides: tuple[str, ...] = ()
    variants: dict[str, list[str]] = field(default_factory=dict)


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep file and validates the configuration of every run.

    Raises:
        ConfigError: the file is none, an unknown key, a bad value, two runs of one name, or a run whose configuration
            is wrong; the message names the file and the key or the run.
    """
    file = _read_file(path)
    base = load_config(file.config, [])
    presets, seeds = file.presets or (base.objective.name,), file.seeds or (base.seed,)
    runs = tuple(
        _run(file, preset, variant, seed, further)
        for preset in presets
        for variant, further in (file.variants or {"": []}).items()
        for seed in seeds
    )
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise ConfigError(f"{path}: {', '.join(twice)} would run twice. Name each preset and each seed once.")
    sweep = Sweep(file.command, file.config, file.run_dir, runs)
    for run in runs:
        try:
            config = sweep.config_of(run)
            if sweep.command == "grpo":
                check_train_batch(config)
        except ConfigError as error:
            raise ConfigError(f"{path}, run {run.name}: {error}") from error
    return sweep


def _run(file: _SweepFile, preset: str, variant: str, seed: int, further: list[str]) -> SweepRun:
    name = "-".join(part for part in (preset, variant, f"seed{seed}") if part)
    run_dir = str(Path(file.run_dir) / name)
    chosen = (f"objective.preset={preset}",) if file.presets else ()  # else the configuration's own, if it has one
    own = (*chosen, f"seed={seed}", f"run_dir={run_dir}")
    words = (*file.overrides, *further, *own)
    last = {word.partition("=")[0]: place for place, word in enumerate(words)}
    kept = (word for place, word in enumerate(words) if place == last[word.partition("=")[0]] or not gives_list(word))
    return SweepRun(name, preset, variant, seed, run_dir, tuple(kept))


def _read_file(path: Path) -> _SweepFile:
    if not path.is_file():
        raise ConfigError(f"SWEEP={str(path)!r} is not a file. Give the path of a sweep's YAML file.")
    tree = OmegaConf.to_container(read_mapping(path))
    assert isinstance(tree, dict), type(tree)
    known = {key.name: key.default for key in fields(_SweepFile)}
    entries = {str(key): value for key, value in tree.items()}
    unknown = [key for key in entries if key not in known]
    if unknown:
        raise ConfigError(f"{path}: {', '.join(unknown)} is not allowed. Keys of a sweep: {', '.join(known)}.")
    for problem in _type_problems(entries):
        raise ConfigError(f"{path}: {problem}")
    words: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}
    words |= {key: home_path(key, words[key]) for key in ("config", "run_dir") if key in words}
    file = _SweepFile(**words)
    for problem in _problems(file):
        raise ConfigError(f"{path}: {problem}")
    return file


def _type_problems(tree: dict[str, Any]) -> Iterator[str]:
    for key in ("command", "config", "run_dir"):
        if not isinstance(tree.get(key, ""), str):
            yield f"{key}={tree[key]!r} is not allowed: it must be a text."
    for key, kind, example in (("presets", str, "[vision_sr1]"), ("seeds", int, "[1, 2]"), ("overrides", str, "[a=1]")):
        if not _is_list(tree.get(key, []), kind):
            yield f"{key}={tree[key]!r} is not allowed: it must be a list like {example}."
    variants = tree.get("variants", {})
    if not isinstance(variants, dict) or not all(
        isinstance(name, str) and _is_list(overrides, str) for name, overrides in variants.items()
    ):
        yield f"variants={variants!r} is not allowed: it must be names with lists like {{lr_low: [optimizer.lr=5e-7]}}."


def _sets_own_key(override: str) -> bool:
    """Also in a section: `objective={preset: gdpo}`. What is no override is told when the runs' words are read."""
    try:
        tree = read_overrides([override])
    except ConfigError:
        return False
    return any(OmegaConf.select(tree, key) is not None for key in OWN_KEYS)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _problems(file: _SweepFile) -> Iterator[str]:
    """What is wrong with the values by themselves."""
    if file.command not in COMMANDS:
        yield f"command={file.command!r} is not allowed: it must be one of {', '.join(COMMANDS)}."
    if not Path(file.config).is_file():
        yield f"config={file.config!r} is not a file. Give the path of the configuration that the runs vary."
    if not file.run_dir:
        yield "run_dir is missing. Give the folder that takes the runs' folders."
    for variant in file.variants:
        if not _NAME.fullmatch(variant):
            yield f"variants.{variant}: the name must be of letters, digits, '_' and '.', for it names a folder."
    for key, overrides in {"overrides": file.overrides, **file.variants}.items():
        for override in overrides:
            if _sets_own_key(override):
                yield f"{key}: {override!r} is not allowed: the sweep sets {', '.join(OWN_KEYS)} for each run."
