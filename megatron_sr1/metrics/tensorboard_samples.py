"""Samples in TensorBoard's files: images, and texts as text. In a folder of their own, which TensorBoard shows as a run
beside the scalars: what is purged of those where a run goes on would take these along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy

from megatron_sr1.metrics.samples import SampleRow, as_code
from megatron_sr1.metrics.tracker import Ending


class TensorBoardSamples:
    """A `Tracker` that takes samples alone; the scalars of steps are another's."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import: only where it is used

        self._writer = SummaryWriter(str(folder), filename_suffix=".samples")
        self.run_id = "tensorboard"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Not here."""

    def show(self, step: int, name: str, rows: Sequence[SampleRow]) -> None:
        """An entry for each row, and one for each of its images."""
        for number, row in enumerate(rows):
            tag = f"{name}/{number}"
            for place, image in enumerate(row.opened()):
                self._writer.add_image(f"{tag}/image_{place}", numpy.asarray(image), step, dataformats="HWC")
            parts = (f"**{column}**\n\n{as_code(text)}" for column, text in row.cells().items() if text)
            self._writer.add_text(tag, "\n".join(parts), step)
        self._writer.flush()

    def finish(self, ending: Ending) -> None:
        """Closes the file."""
        self._writer.close()
