"""Trackers of a run: they get its configuration, each step's metrics and each evaluation's summary.

`<run_dir>/trackers.json` keeps what each tracker calls the run, so that a run that continues stays one run there, and
which evaluations it has.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_sr1.config import Config, TrackConfig
from megatron_sr1.metrics.background import BackgroundTracker
from megatron_sr1.metrics.samples import SampleRow, evaluation_rows
from megatron_sr1.metrics.tracker import Ending, Tracker

STATE_FILE = "trackers.json"
SAMPLES = "samples"  # what names of tables begin with
TENSORBOARD = "tensorboard"  # it has the scalars of each step in any case
STARTED_FROM = ("before", "after", "step-")  # labels of evaluations during training, one curve; others are on their own


class Trackers:
    """The trackers that the configuration asks for, while its `with` block lasts. Use on one rank only.

    A step may come twice, where a run continues from before it: both values are kept, which are the same.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._folder = config, Path(config.run_dir)
        self._trackers: dict[str, BackgroundTracker] = {}
        self._state: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Trackers:
        self._state = _read_state(self._folder)
        try:
            for name, target in _targets(self._config.track).items():
                known = self._state.get(name, {})
                same = known.get("target") == target
                run_id = known["run_id"] if same else None
                tracker = BackgroundTracker(name, functools.partial(_open, name, self._config, run_id))
                self._trackers[name] = tracker
                if not tracker.run_id:  # it is away: whoever continues tries again
                    continue
                sent = known["evaluations"] if same else {}
                self._state[name] = {"target": target, "run_id": tracker.run_id, "evaluations": sent}
                _write_state(self._folder, self._state)
        except ValueError:
            self._finish("failed")
            raise
        self._send_evaluations()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._send_evaluations()
        self._finish("finished" if kind is None else "stopped" if kind is SystemExit else "failed")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the metrics of `step`, and evaluations that have come since, to every tracker."""
        for tracker in self._trackers.values():
            tracker.write(step, values)
        self._send_evaluations()

    def show(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Hands samples of the rollouts of `step` to every tracker."""
        for tracker in self._trackers.values():
            tracker.show(step, f"{SAMPLES}/rollouts", rows)

    def _send_evaluations(self) -> None:
        samples = self._config.track.samples
        for name, tracker in self._trackers.items():
            for path, digest in _unsent(self._folder, self._state[name]).items() if tracker.is_open else ():
                tree = json.loads(path.read_text(encoding="utf-8"))
                if not tracker.write(tree["step"], evaluation_metrics(tree["label"], tree["summary"])):
                    break
                if samples.every:
                    rows = evaluation_rows(self._folder, tree, samples.count)
                    tracker.show(tree["step"], f"{SAMPLES}/{_curve(tree['label'])}", rows)
                self._state[name]["evaluations"][path.name] = digest
                _write_state(self._folder, self._state)

    def _finish(self, ending: Ending) -> None:
        while self._trackers:
            _, tracker = self._trackers.popitem()
            tracker.finish(ending)


def send_evaluations(config: Config) -> None:
    """Hands evaluations in the run folder that a tracker does not have yet to it: what came after the last step."""
    state = _read_state(Path(config.run_dir))
    targets = _targets(config.track)
    if any(_unsent(Path(config.run_dir), state.get(name, {"evaluations": {}})) for name in targets):
        with Trackers(config):
            pass


def evaluation_metrics(label: str, summary: Mapping[str, Any]) -> dict[str, float]:
    """`eval/<name>` of an evaluation before, during or after training, `eval/<label>/<name>` of any other; numbers
    only, and only what was measured."""
    prefix = _curve(label)
    numbers = {name: value for name, value in summary.items() if type(value) in (int, float)}
    return {f"{prefix}/{name}": float(value) for name, value in numbers.items() if math.isfinite(value)}


def _curve(label: str) -> str:
    return "eval" if label.startswith(STARTED_FROM) else f"eval/{label}"


def parameters(config: Config) -> dict[str, str]:
    """What a tracker shows of a run: each key of the resolved configuration, dotted, and the command line."""
    flat: dict[str, str] = {}
    pending: list[tuple[str, Any]] = [("", asdict(config))]
    while pending:
        key, value = pending.pop(0)
        if isinstance(value, dict):
            pending += [(f"{key}.{name}" if key else name, inner) for name, inner in value.items()]
        else:
            flat[key] = json.dumps(value) if isinstance(value, list | tuple) else str(value)
    return {**flat, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}


def run_name(config: Config, given: str) -> str:
    """The run's name in a tracker: as given, or the last two parts of its folder."""
    return given or "/".join(Path(config.run_dir).parts[-2:])


def _targets(track: TrackConfig) -> dict[str, list[str]]:
    """What names the place a tracker's run is in; an id from elsewhere means nothing there."""
    targets = {}
    if track.wandb.mode != "disabled":
        targets["wandb"] = [track.wandb.entity, track.wandb.project]
    if track.mlflow.uri:
        targets["mlflow"] = [track.mlflow.uri, track.mlflow.experiment]
    if track.trackio.enabled:
        targets["trackio"] = [track.trackio.project]
    if track.samples.every:
        targets[TENSORBOARD] = []
    return targets


def _open(name: str, config: Config, run_id: str | None) -> Tracker:
    if name == "wandb":
        from megatron_sr1.metrics.wandb_tracker import WandbTracker  # each imports a package of an extra

        return WandbTracker(config, parameters(config), run_name(config, config.track.wandb.name), run_id)
    if name == "trackio":
        from megatron_sr1.metrics.trackio_tracker import TrackioTracker

        return TrackioTracker(config, parameters(config), run_id or run_name(config, config.track.trackio.name))
    if name == TENSORBOARD:
        from megatron_sr1.metrics.tensorboard_samples import TensorBoardSamples

        return TensorBoardSamples(Path(config.run_dir) / TENSORBOARD / SAMPLES)
    from megatron_sr1.metrics.mlflow_tracker import MlflowTracker

    return MlflowTracker(config.track.mlflow, parameters(config), run_name(config, config.track.mlflow.name), run_id)


def _unsent(folder: Path, state: Mapping[str, Any]) -> dict[Path, str]:
    digests = {
        path: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted((folder / "eval").glob("*.json"))
    }
    return {path: digest for path, digest in digests.items() if state["evaluations"].get(path.name) != digest}


def _read_state(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Remove it; the trackers then get a new run.") from error


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (STATE_FILE + ".tmp")
    partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / STATE_FILE)
