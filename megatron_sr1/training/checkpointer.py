"""Saves and restores a policy with the progress of its loop.

A checkpoint is a folder `step_<n>` of Megatron-Core's distributed checkpointing plus `progress.json` and, where that is
wanted, the weights in Hugging Face format in `hf`. Saving copies what each rank writes to the host, and the run goes on
while threads write it (`checkpoint_writer.py`) into a folder of another name. That is renamed when every rank is done,
so a folder with the right name is always whole, and until then the one before is.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sr1.config import PixelLimits, saved_steps
from megatron_sr1.phases import during
from megatron_sr1.platform import Platform
from megatron_sr1.policy import Policy
from megatron_sr1.ranks import agreed
from megatron_sr1.training.checkpoint_room import in_mib, make_room, no_space, remove_checkpoint, warn_of_next
from megatron_sr1.training.checkpoint_writer import BegunSave, CheckpointPlan
from megatron_sr1.training.checksums import Checksums, check_checksums, write_checksums
from megatron_sr1.weights import ForeignCode, HfShare, check_megatron_dir, copy_side_files

_POLL_SECONDS = 1.0
HF = "hf"  # in a checkpoint: the weights in Hugging Face format


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
    bad_steps: int = 0  # in a row up to here, see `BadSteps`


@dataclass(frozen=True)
class HfSource:
    """What makes the weights of a checkpoint a Hugging Face model: configuration, tokenizer and processor files."""

    hf_dir: str
    pixels: PixelLimits | None = None  # that its image processor gets


@dataclass(frozen=True)
class _Begun:
    """A checkpoint that is being written."""

    partial: Path
    progress: Progress
    writing: BegunSave
    num_bytes: int  # that all ranks write
    hf: HfShare | None
    source: HfSource | None


class Checkpointer:
    """The checkpoints of one run folder. All ranks call its methods together."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        platform: Platform,
        *,
        keep_every: int = 0,
        best: Callable[[Sequence[int]], int | None] = lambda steps: None,
        in_background: bool = False,
    ) -> None:
        """
        Args:
            keep: how many of the newest stay.
            keep_every: those of steps that it divides stay as well; 0: of none.
            best: of the steps that it is given, the one whose checkpoint stays as well.
            in_background: the run goes on while a checkpoint is written; `settle` then finishes it.
        """
        self.folder = folder
        self.keep_every = keep_every
        self.keep = keep
        self.platform = platform
        self._best = best
        self._in_background = in_background
        self._plan: CheckpointPlan | None = None
        self._begun: _Begun | None = None
        self.last: int | None = None  # step of the newest that was finished here

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return saved_steps(self.folder)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is begun and not finished."""
        return self._begun is not None

    @during("save")
    def save(self, policy: Policy, progress: Progress, hf: HfSource | None = None) -> None:
        """Begins a checkpoint, when the one before is finished; the policy may change as soon as this returns.

        Args:
            hf: the weights are written in Hugging Face format as well, each file by one rank.

        Raises:
            ValueError: this one or the one before could not be written, or there is no room for it; those before it
                stay.
        """
        self.settle()
        partial = Path(self.platform.on_main(lambda: self._room(progress.step)))
        share = None if hf is None else HfShare(policy.folder_weights(), self.platform.ranks)
        if self._plan is None:
            self._plan = CheckpointPlan(policy.groups.replicas, on_cpu=self.platform.on_cpu)
        further = None if share is None else functools.partial(share.write, partial / HF)
        writing = self._plan.begin(policy.sharded_state(loading=False), partial, further)
        own_bytes = writing.num_bytes + (0 if share is None else share.num_bytes)
        num_bytes = sum(self.platform.ranks.gather([own_bytes]))
        surplus = functools.partial(self._surplus, progress.step)
        self.platform.on_main(lambda: make_room(self.folder, num_bytes, partial, surplus))
        writing.start()
        self._begun = _Begun(partial, progress, writing, num_bytes, share, hf)
        if not self._in_background:
            self.settle()

    @during("save")
    def settle(self, *, wait: bool = True) -> None:
        """Finishes the checkpoint that is being written, and removes the oldest beyond those to keep.

        Args:
            wait: until it is written; else nothing is finished where it is not.

        Raises:
            ValueError: it could not be written; those before it stay.
        """
        begun = self._begun
        if begun is None:
            return
        written = 0
        # a question that takes no longer than a second, however slow a disk: no collective waits for one
        while self.platform.ranks.any(not begun.writing.is_written(_POLL_SECONDS if wait else 0.0)):
            if not wait:
                return
            if (now := begun.writing.num_written) != written:
                written = now
                during.moved()
        self._begun = None
        try:
            begun.writing.finish()
            agreed(self.platform.ranks, functools.partial(_check_written, begun.writing))
        except (CheckpointException, ValueError) as error:  # the first holds the tracebacks of its writers
            reason = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise ValueError(self._refusal(begun, reason)) from error
        checksums = dict(self.platform.ranks.gather(list(begun.writing.checksums.items())))
        self.platform.on_main(lambda: self._complete(begun, checksums))
        self.last = begun.progress.step

    def let_go(self, seconds: float) -> None:
        """Waits for this rank's share of what is being written, but no longer: a thread that is writing when the
        interpreter ends aborts the process (SIGABRT), whatever status it was to end with."""
        if self._begun is not None:
            self._begun.writing.is_written(seconds)

    def prune(self) -> None:
        """At the end of a run, removes the oldest beyond those to keep, when the newest may be the best, and what a
        killed run has left unfinished."""

        def remove() -> None:
            self._prune(self.steps())
            self._remove_unfinished()

        self.platform.on_main(remove)

    def _room(self, step: int) -> str:
        """A folder that no other process writes to, whatever is left of an earlier run."""
        try:
            self._remove_unfinished()
            partial = self.path(step).with_suffix(f".partial-{secrets.token_hex(4)}")
            partial.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"{self.path(step)} could not be written: {error}. Choose another run_dir.") from error
        return str(partial)

    def _remove_unfinished(self) -> None:
        for left in self.folder.glob("step_*.partial*"):
            shutil.rmtree(left, ignore_errors=True)

    def _refusal(self, begun: _Begun, reason: str) -> str:
        """Gives back the room of a checkpoint that could not be written."""
        shutil.rmtree(begun.partial, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free
        if free < begun.num_bytes:
            return no_space(self.path(begun.progress.step), begun.num_bytes, free)
        return (
            f"{self.path(begun.progress.step)} could not be written ({reason}): {in_mib(free)} are free there without "
            "it. Make room, or allow larger files; the same command goes on from the checkpoint before."
        )

    def _complete(self, begun: _Begun, checksums: Checksums) -> None:
        final = self.path(begun.progress.step)
        try:
            if begun.hf is not None and begun.source is not None:
                begun.hf.write_index(begun.partial / HF)
                copy_side_files(begun.source.hf_dir, begun.partial / HF, pixels=begun.source.pixels)
            with (begun.partial / "progress.json").open("w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(begun.progress), indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            write_checksums(begun.partial, checksums)
            shutil.rmtree(final, ignore_errors=True)
            begun.partial.rename(final)
        except OSError as error:
            raise ValueError(self._refusal(begun, str(error))) from error
        self._prune(self.steps()[:-1])  # the newest is not measured yet, whatever an earlier start has left
        warn_of_next(self.folder, begun.num_bytes, functools.partial(self._surplus, begun.progress.step + 1))

    def _prune(self, measured: Sequence[int]) -> None:
        for step in self._beyond(self.steps(), measured):
            remove_checkpoint(self.path(step))

    def _beyond(self, steps: Sequence[int], measured: Sequence[int]) -> list[int]:
        """Those of the steps that are not kept."""
        best = self._best(measured)
        beyond = steps[: -self.keep]
        return [step for step in beyond if step != best and (not self.keep_every or step % self.keep_every)]

    def _surplus(self, step: int) -> list[Path]:
        """What a checkpoint of `step` will leave to be removed, but for the newest that is whole, oldest first."""
        there = self.steps()
        beyond = self._beyond(sorted({*there, step}), there)
        return [self.path(old) for old in beyond if old not in (*there[-1:], step)]

    def newest(self) -> Progress | None:
        """The progress of the newest checkpoint that is whole, without its weights; None where there is none. One that
        is broken is named on standard error, and the one before is looked at. Every rank reads its share of the files.
        Collective.

        Raises:
            ValueError: there are checkpoints, and all are broken; one asks for code that no checkpoint has.
        """
        broken: dict[int, str] = {}  # step -> what is wrong; the main rank's alone is complete
        while True:
            progress = self.platform.on_main(lambda: self._newest(broken))  # the others must come to the same
            if progress is None:
                return None
            wrong = check_checksums(self.path(progress.step), self.platform.ranks)
            if not wrong:
                return progress
            self._leave_out(progress.step, "; ".join(wrong), broken)

    def _newest(self, broken: dict[int, str]) -> Progress | None:
        """Of those that are not known to be broken."""
        for step in reversed(self.steps()):
            if step in broken:
                continue
            try:
                progress = self._progress(step)
                check_megatron_dir(self.path(step))
            except ForeignCode:
                raise
            except ValueError as error:
                self._leave_out(step, str(error), broken)
            else:
                return progress
        if not broken:
            return None
        found = "; ".join(text.rstrip(".") for text in broken.values())
        raise ValueError(f"no checkpoint in {self.folder} can be read: {found}. Choose another run_dir.")

    def _leave_out(self, step: int, wrong: str, broken: dict[int, str]) -> None:
        broken[step] = wrong
        if self.platform.is_main:
            print(f"{self.path(step)} is broken and left out: {wrong}", file=sys.stderr)

    def restore(self, policy: Policy, progress: Progress) -> None:
        """Loads the weights and the optimizer's state of what `newest` has found.

        Raises:
            ValueError: it belongs to another kind of optimizer, asks for code that no checkpoint has, is truncated, or
                was written by a newer Megatron-Core.
        """
        path = self.path(progress.step)
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
        path = self.path(step) / "progress.json"
        try:
            progress = Progress(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is missing or corrupt ({error})") from error
        if progress.step != step:
            raise ValueError(f"{path} is of step {progress.step}")
        return progress

    def path(self, step: int) -> Path:
        """Where the checkpoint after so many steps is, or would be."""
        return self.folder / f"step_{step:06d}"


def _check_written(writing: BegunSave) -> None:
    """Raises ValueError where this rank has not written everything."""
    if writing.failure is not None:
        raise ValueError(writing.failure)
