"""How far a run of a sweep is, from what it has left in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron_sr1.config import Config, ConfigError, load_config, values_by_key
from megatron_sr1.launch.sweep.file import Sweep, SweepRun

State = Literal["new", "started", "finished"]


def choose_runs(sweep: Sweep, names: Sequence[str]) -> list[SweepRun]:
    """The runs of these names, in the order of the sweep; all where none is named.

    Raises:
        ConfigError: a name that the sweep does not have.
    """
    known = [run.name for run in sweep.runs]
    strange = [name for name in names if name not in known]
    if strange:
        raise ConfigError(f"--only {' '.join(strange)}: the sweep has no such run. Its runs: {', '.join(known)}.")
    return [run for run in sweep.runs if not names or run.name in names]


def state_of(sweep: Sweep, run: SweepRun) -> State:
    """A run is finished when its weights are exported and, where that was asked for, the export is verified.

    Raises:
        ConfigError: the folder holds a run of another configuration, which this one would continue; trackers alone may
            differ.
    """
    folder, config = Path(run.run_dir), sweep.config_of(run)
    if not (folder / "config.yaml").is_file():
        return "new"
    changes = _differences(load_config(folder / "config.yaml", []), config)
    if changes:
        raise ConfigError(
            f"run {run.name}: {folder} was made with another configuration ({', '.join(changes)}). Remove that folder, "
            "or give the sweep another run_dir."
        )
    verified = sweep.command != "grpo" or not config.evaluate.verify_export or (folder / "export.json").is_file()
    return "finished" if verified and (folder / "hf" / "config.json").is_file() else "started"


def _differences(there: Config, here: Config) -> list[str]:
    """Without the trackers, which change no number."""
    old, new = values_by_key(there), values_by_key(here)
    changed = (key for key in new if old[key] != new[key] and not key.startswith("track."))
    return [f"{key}: {old[key]} there, {new[key]} now" for key in changed]
