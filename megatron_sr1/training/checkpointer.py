"""Saves and restores a policy with the progress of its loop.

A checkpoint is a folder `step_<n>` of Megatron-Core's distributed checkpointing plus `progress.json`. It is written
under another name and renamed when every rank is done, so a folder with the right name is always whole.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sr1.config import saved_steps
from megatron_sr1.platform import Platform
from megatron_sr1.platform.megatron_private import read_results_in_process
from megatron_sr1.policy import Policy
from megatron_sr1.weights import ForeignCode, check_megatron_dir

read_results_in_process()


@dataclass(frozen=True)
class Progress:
    """How far a loop has come."""

    step: int  # optimizer or rollout steps done
    position: int  # samples of the training stream consumed
    dataset_fingerprint: str
    model_dir: str  # the weights the run, and its reference, started from, as they were spelled
    stream: Mapping[str, Any] = field(default_factory=dict)  # the state of the training stream, as JSON
    model: str = ""  # those weights' `model_fingerprint`
    pixels: Mapping[str, int] = field(default_factory=dict)  # `PixelLimits`, where the run sets any


class Checkpointer:
    """The checkpoints of one run folder. All ranks call its methods together."""

    def __init__(self, folder: Path, keep: int, platform: Platform, *, keep_every: int = 0) -> None:
        """
        Args:
            keep: how many of the newest stay.
            keep_every: those of steps that it divides stay as well; 0: of none.
        """
        self.folder = folder
        self.keep_every = keep_every
        self.keep = keep
        self.platform = platform

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return saved_steps(self.folder)

    def save(self, policy: Policy, progress: Progress) -> Path:
        """Writes a checkpoint and removes the oldest beyond those to keep.

        Raises:
            ValueError: it could not be written; those before it stay.
        """
        final = self._path(progress.step)
        partial = final.with_suffix(".partial")
        if self.platform.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        try:
            state = policy.sharded_state(loading=False)
            # what replicas hold alike, each of them writes a part of
            strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), policy.groups.replicas)
            dist_checkpointing.save(state, str(partial), sharded_strategy=strategy)
        except CheckpointException as error:  # holds the tracebacks of its writers
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            free = shutil.disk_usage(self.folder).free >> 20
            shutil.rmtree(partial, ignore_errors=True)
            raise ValueError(
                f"{final} could not be written ({reason}): {free} MiB are free there without it. Make room, or allow "
                "larger files; the same command goes on from the checkpoint before."
            ) from error
        if self.platform.is_main:
            (partial / "progress.json").write_text(json.dumps(asdict(progress), indent=1) + "\n")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for step in self.steps()[: -self.keep]:
                if not self.keep_every or step % self.keep_every:
                    shutil.rmtree(self._path(step))
        torch.distributed.barrier()
        return final

    def newest(self) -> Progress | None:
        """The progress of the newest checkpoint that is whole, without its weights; None where there is none. One that
        is broken is named on standard error, and the one before is looked at. Collective.

        Raises:
            ValueError: there are checkpoints, and all are broken; one asks for code that no checkpoint has.
        """
        return self.platform.on_main(self._newest)  # the others must come to the same

    def _newest(self) -> Progress | None:
        broken = []
        for step in reversed(self.steps()):
            try:
                progress = self._progress(step)
                check_megatron_dir(self._path(step))
            except ForeignCode:
                raise
            except ValueError as error:
                broken.append(str(error))
                print(f"{self._path(step)} is broken and left out: {error}", file=sys.stderr)
            else:
                return progress
        if not broken:
            return None
        raise ValueError(f"no checkpoint in {self.folder} can be read: {'; '.join(broken)}. Choose another run_dir.")

    def restore(self, policy: Policy, progress: Progress) -> None:
        """Loads the weights and the optimizer's state of what `newest` has found.

        Raises:
            ValueError: it belongs to another kind of optimizer, asks for code that no checkpoint has, is truncated, or
                was written by a newer Megatron-Core.
        """
        path = self._path(progress.step)
        check_megatron_dir(path)
        try:
            then = dist_checkpointing.load_common_state_dict(str(path))["distributed_optimizer"]
        except CheckpointingException as error:
            raise ValueError(
                f"{path} was written by a newer Megatron-Core than {version('megatron-core')}, which does not read it "
                f"({error}). Go on where it was written, or export its weights: megatron-sr1 convert megatron-to-hf."
            ) from error
        now = policy.config.layout.distributed_optimizer
        if then != now:
            raise ValueError(
                f"{path} was saved with layout.distributed_optimizer={then}, but this run has {now}: the one cannot "
                "read the other's moments. Keep it as it was; every other key of the layout may change."
            )
        state: Any = dist_checkpointing.load(policy.sharded_state(loading=True), str(path))
        policy.load_state(state, progress.step)

    def _progress(self, step: int) -> Progress:
        path = self._path(step) / "progress.json"
        try:
            progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is missing or corrupt ({error})") from error
        if progress.step != step:
            raise ValueError(f"{path} is of step {progress.step}")
        return progress

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"
