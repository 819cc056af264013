"""A run in MLflow: a server, or an SQLite file."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when the library is imported; it has no other switch

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL.Image import Image

from megatron_sr1.config import ConfigError
from megatron_sr1.config.tracking import MlflowConfig
from megatron_sr1.metrics.samples import SampleRow, table_json
from megatron_sr1.metrics.tracker import Ending, TrackerAway

LONGEST_VALUE = 6000  # characters of a parameter
BATCH = 100  # parameters or points of one request
TABLES = "mlflow.loggedArtifacts"  # the tag by which MLflow finds tables
MOST_TABLES = 40  # in it, the newest: a tag holds 8000 characters
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def artifact_location(uri: str) -> str | None:
    """Of a new experiment's files: beside an SQLite file, for MLflow itself would take a folder of wherever the command
    is given; None: the server's."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(f"{path}.artifacts").resolve().as_uri()


class MlflowTracker:
    """Points that the server does not take are kept and go with the next step: a run does not end because of it.

    Args:
        track: where to.
        parameters: logged as the run's; MLflow never changes one, so what differs where a run continues is a tag.
        name: of the run.
        run_id: of the run to continue, None for a new one.

    Raises:
        ConfigError: the server refuses the run, or has none of that id any more.
        TrackerAway: it cannot be reached.
    """

    def __init__(self, track: MlflowConfig, parameters: Mapping[str, str], name: str, run_id: str | None) -> None:
        self._unsent: list[Metric] = []
        try:
            self._uri = track.uri
            self._client = MlflowClient(tracking_uri=track.uri)
            if run_id is None:
                run_id = self._client.create_run(self._experiment(track.experiment), run_name=name).info.run_id
            else:
                self._client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            self._send_parameters({key: value[:LONGEST_VALUE] for key, value in parameters.items()})
        except MlflowException as error:
            reason = " ".join(str(error).split())
            if not 400 <= error.get_http_status_code() < 500:
                raise TrackerAway(f"track.mlflow.uri={track.uri!r}: {reason}") from error
            raise ConfigError(f"track.mlflow.uri={track.uri!r}: {reason} Correct it, or leave the key out.") from error

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return known.experiment_id
        return self._client.create_experiment(name, artifact_location=artifact_location(self._uri))

    def _send_parameters(self, parameters: Mapping[str, str]) -> None:
        there = self._client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in parameters.items() if key not in there]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + BATCH])
        changed = {key: value for key, value in parameters.items() if there.get(key, value) != value}
        self._client.log_batch(self.run_id, tags=[RunTag(f"changed.{key}", value) for key, value in changed.items()])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point per name, of the finite values."""
        now = int(1000 * time.time())  # MLflow's clock, milliseconds
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._unsent += [Metric(name, value, now, step) for name, value in finite.items()]
        self._send()

    def show(self, step: int, name: str, rows: Sequence[SampleRow]) -> None:
        """A table as MLflow's own `log_table` keeps it, which needs pandas; a file a step, so that none grows."""
        stem = f"{name}/step_{step:06d}"
        cells = [
            [self._image(f"{stem}/{number}_{place}.png", image) for place, image in enumerate(row.opened())]
            for number, row in enumerate(rows)
        ]
        self._client.log_text(self.run_id, table_json(rows, cells), f"{stem}.json")
        entry, tags = {"path": f"{stem}.json", "type": "table"}, self._client.get_run(self.run_id).data.tags
        known = [one for one in json.loads(tags.get(TABLES, "[]")) if one != entry]
        self._client.set_tag(self.run_id, TABLES, json.dumps([*known, entry][-MOST_TABLES:]))

    def _image(self, path: str, image: Image) -> dict[str, str]:
        self._client.log_image(self.run_id, image, path)
        return {"type": "image", "filepath": path, "compressed_filepath": path}

    def _send(self) -> None:
        while self._unsent:
            try:
                self._client.log_batch(self.run_id, metrics=self._unsent[:BATCH])
            except MlflowException as error:
                warnings.warn(f"MLflow takes no metrics, {len(self._unsent)} wait: {error}", stacklevel=2)
                return
            del self._unsent[:BATCH]

    def finish(self, ending: Ending) -> None:
        """Ends the run there; what was never taken is in metrics.jsonl alone."""
        self._send()
        try:
            self._client.set_terminated(self.run_id, STATUS[ending])
        except MlflowException as error:
            warnings.warn(f"MLflow was not told that the run has ended: {error}", stacklevel=2)
