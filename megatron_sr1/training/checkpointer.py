"""Saves and restores a policy with the progress of its loop.

A checkpoint is a folder `step_<n>` of Megatron-Core's distributed checkpointing plus `progress.json`. It is written
under another name and renamed when every rank is done, so a folder with the right name is always whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core import dist_checkpointing

from megatron_sr1.platform import Platform
from megatron_sr1.platform.megatron_private import read_results_in_process
from megatron_sr1.policy import Policy
from megatron_sr1.weights import check_megatron_dir

read_results_in_process()


@dataclass(frozen=True)
class Progress:
    """How far a loop has come."""

    step: int  # optimizer or rollout steps done
    position: int  # samples of the training stream consumed
    dataset_fingerprint: str
    model_dir: str  # the weights the run, and its reference, started from
    stream: Mapping[str, Any] = field(default_factory=dict)  # the state of the training stream, as JSON


class Checkpointer:
    """The checkpoints of one run folder. All ranks call its methods together."""

    def __init__(self, folder: Path, keep: int, platform: Platform) -> None:
        self.folder = folder
        self.keep = keep
        self.platform = platform

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = self.folder.glob("step_*") if self.folder.is_dir() else ()
        return sorted(int(path.name.removeprefix("step_")) for path in names if path.suffix == "")

    def save(self, policy: Policy, progress: Progress) -> Path:
        """Writes a checkpoint and removes the oldest beyond the number to keep."""
        final = self._path(progress.step)
        partial = final.with_suffix(".partial")
        if self.platform.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(policy.sharded_state(loading=False), str(partial))
        if self.platform.is_main:
            (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self._path(step))
        torch.distributed.barrier()
        return final

    def newest(self) -> Progress | None:
        """The progress of the newest checkpoint, without its weights; None where there is none."""
        steps = self.steps()
        return self._progress(steps[-1]) if steps else None

    def restore(self, policy: Policy, dataset_fingerprint: str, model_dir: str) -> Progress | None:
        """Loads the newest checkpoint; None where there is none.

        Raises:
            ValueError: the checkpoint belongs to other data, another starting model or another kind of optimizer; it
                asks for code that no checkpoint has, or is truncated.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        progress = self._progress(steps[-1])
        for name, now in (("dataset_fingerprint", dataset_fingerprint), ("model_dir", model_dir)):
            then = asdict(progress)[name]
            if then != now:
                raise ValueError(
                    f"{path} was saved with {name} {then!r}, but this run has {now!r}. Continue with the same data and "
                    "model.hf_dir, or choose another run_dir."
                )
        check_megatron_dir(path)
        then = dist_checkpointing.load_common_state_dict(str(path))["distributed_optimizer"]
        now = policy.config.layout.distributed_optimizer
        if then != now:
            raise ValueError(
                f"{path} was saved with layout.distributed_optimizer={then}, but this run has {now}: the one cannot "
                "read the other's moments. Keep it as it was; every other key of the layout may change."
            )
        policy.load_state(dist_checkpointing.load(policy.sharded_state(loading=True), str(path)))
        return progress

    def _progress(self, step: int) -> Progress:
        return Progress(**json.loads((self._path(step) / "progress.json").read_text()))

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"
