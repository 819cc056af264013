"""A run in Trackio, in files of this machine: `<run_dir>/trackio`. Nothing is sent."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_sr1.config import Config, ConfigError
from megatron_sr1.metrics.samples import COLUMNS, SampleRow, as_code
from megatron_sr1.metrics.tracker import Ending
from megatron_sr1.printable import printable

FOLDER = "trackio"
_SPEAKING = ("trackio", "trackio.run", "trackio.utils")  # its modules that print
_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID")  # where the library would send a run


def _only_warnings(*parts: object, **options: object) -> None:
    text = " ".join(map(str, parts))
    if "warning" in text.lower():
        print(printable(text), file=sys.stderr, flush=True)


class TrackioTracker:
    """Points and tables of one run. Texts are shown as code: Trackio would draw what a model writes as Markdown.

    Args:
        config: of the run.
        parameters: shown as the run's configuration.
        name: of the run; one that continues is known by it.

    Raises:
        ConfigError: the environment would have it sent to another machine.
    """

    def __init__(self, config: Config, parameters: Mapping[str, str], name: str) -> None:
        elsewhere = [variable for variable in _ELSEWHERE if os.environ.get(variable)]
        if elsewhere:
            raise ConfigError(
                f"track.trackio.enabled keeps a run on this machine, and {', '.join(elsewhere)} would send it away. "
                "Unset it, or leave the key out."
            )
        folder = (Path(config.run_dir) / FOLDER).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TRACKIO_DIR"] = str(folder)  # read when the library is imported; it has no other switch
        self._library: Any = import_module("trackio")
        for module in _SPEAKING:
            vars(import_module(module))["print"] = _only_warnings  # it greets, in colours, on standard output
        own = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run = self._library.init(
            config.track.trackio.project, name=name, resume="allow", config=dict(parameters), **own
        )
        self.run_id = name

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point per name, of the finite values."""
        self._run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def show(self, step: int, name: str, rows: Sequence[SampleRow]) -> None:
        """A table with the images in its first column."""
        data = []
        for row in rows:
            images = [self._library.Image(image) for image in row.opened()]
            cells = row.cells()
            data.append([images, *(as_code(cells[column]) if cells[column] else "" for column in COLUMNS)])
        self._run.log({name: self._library.Table(columns=["images", *COLUMNS], data=data)}, step=step)

    def finish(self, ending: Ending) -> None:
        """Waits until all is on the disk."""
        self._run.finish()
