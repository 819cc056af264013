"""A run in Weights & Biases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb
from wandb.errors import AuthenticationError, CommError

from megatron_sr1.config import Config, ConfigError
from megatron_sr1.metrics.samples import COLUMNS, SampleRow
from megatron_sr1.metrics.tracker import Ending, TrackerAway

# reports of the library's own errors, and Weave, which would record the calls to a judge; it has no other switches
_QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_DISABLE_WEAVE": "true"}


class WandbTracker:
    """Online, or in files below `<run_dir>/wandb` for `wandb sync`.

    Host, user, paths, source code and console output stay here; utilisation of the machine goes along.

    Args:
        config: of the run.
        parameters: shown as the run's configuration.
        name: of the run.
        run_id: of the run to continue, None for a new one.

    Raises:
        ConfigError: the server refuses the run.
        TrackerAway: it cannot be reached.
    """

    def __init__(self, config: Config, parameters: Mapping[str, str], name: str, run_id: str | None) -> None:
        self.run_id = run_id or uuid.uuid4().hex[:12]
        track, folder = config.track.wandb, Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # what tables hold waits there for `wandb sync`; the library would have it wait in the user's home
        for variable, value in {**_QUIET, "WANDB_DATA_DIR": str((folder / "wandb" / "data").resolve())}.items():
            os.environ.setdefault(variable, value)
        try:
            self._run = wandb.init(
                project=track.project,
                entity=track.entity or None,
                group=track.group or None,
                name=name,
                id=self.run_id,
                resume="allow",
                mode=track.mode,
                dir=str(folder),
                config=dict(parameters),
                allow_val_change=True,
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, save_code=False, x_disable_meta=True
                ),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            if isinstance(error, CommError) and not isinstance(error, AuthenticationError):
                raise TrackerAway(reason) from error
            raise ConfigError(
                f"track.wandb.mode={track.mode!r}: {reason} Check WANDB_API_KEY and the network, or set it to offline."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # steps that run again after a kill may come twice

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point per name; sent in the background."""
        self._run.log({"step": step, **values})

    def show(self, step: int, name: str, rows: Sequence[SampleRow]) -> None:
        """A table with a column for each image."""
        most = max((len(row.images) for row in rows), default=0)
        table = wandb.Table(columns=[*(f"image_{number}" for number in range(most)), *COLUMNS])
        for row in rows:
            images = [wandb.Image(image) for image in row.opened()]
            cells = row.cells()
            table.add_data(*images, *[None] * (most - len(images)), *(cells[column] for column in COLUMNS))
        self._run.log({"step": step, name: table})

    def finish(self, ending: Ending) -> None:
        """Waits until all is on its way, or on the disk."""
        if ending == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(ending != "finished"))
