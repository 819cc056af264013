"""A run that is killed again and again: rerun by the same command each time, and compared with an undisturbed one."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sr1.training.rollout_files import step_lines, steps_in
from tests.faults.moments import Moments
from tests.faults.processes import GONE, Started
from tests.workspace import Workspace, untimed

END_SECONDS = 10.0  # from a kill until nothing of the run is left
GOES_ON = ("grader", "child of a grader", "resource tracker")  # a run survives the loss of one
LAST_SECONDS = 600.0  # for what goes on
IN_USE = "is in use by another process"


@dataclass(frozen=True)
class Trial:
    """One fault, and what came of it."""

    run: str
    part: str  # of the run, in which it was killed
    role: str  # of the process that was killed
    seconds: float | None  # until all others had ended; None: they had to be killed, or the run went on
    went_on: bool  # the run was not ended by it
    wrong: tuple[str, ...] = ()  # what should not be


class Chains:
    """Runs that are to end like `whole`, in the same workspace and with the same words."""

    def __init__(self, workspace: Workspace, whole: str, words: Sequence[str], moments: Moments) -> None:
        self._workspace, self._whole, self._words, self._moments = workspace, whole, tuple(words), moments

    def start(self, run: str, attempt: int) -> Started:
        """The command of a run."""
        command = self._workspace.command("grpo", run, *self._words)
        return Started(command, self._workspace.folder / f"{run}.{attempt}.log")

    def disturb(self, run: str, faults: Sequence[tuple[str, str]], draw: random.Random) -> list[Trial]:
        """Kills a run once for each (part, role), and lets it end. The last trial bears what is wrong with the end."""
        trials: list[Trial] = []
        for attempt, (part, role) in enumerate(faults):
            started = self.start(run, attempt)
            try:
                if not self._moments.wait_for(part, run, started, draw):
                    status = started.process.wait(LAST_SECONDS)
                    if status == 0:
                        break  # the part does not come any more: the run is done
                    trials.append(Trial(run, part, role, None, went_on=False, wrong=self._said(started, status)))
                    break
                trials.append(_kill(run, part, role, started, draw))
            finally:
                started.close()
        return [*trials[:-1], self._ended(run, trials[-1], len(faults))] if trials else []

    def _ended(self, run: str, last: Trial, attempt: int) -> Trial:
        started = self.start(run, attempt)
        try:
            status = started.process.wait(LAST_SECONDS)
            wrong = self._said(started, status) if status else self.differences(run)
            if started.ended_within(END_SECONDS) is None:
                wrong += (f"left: {sorted(started.roles())}",)
        finally:
            started.close()
        return Trial(last.run, last.part, last.role, last.seconds, last.went_on, (*last.wrong, *wrong))

    def _said(self, started: Started, status: int) -> tuple[str, ...]:
        lines = started.log.read_text(errors="replace").strip().splitlines()
        return (f"ended with status {status}: {lines[-1] if lines else 'nothing said'}",)

    def differences(self, run: str) -> tuple[str, ...]:
        """What is not as in the undisturbed run."""
        found, folder = [], self._workspace.folder
        ours, whole = folder / run, folder / self._whole
        if (ours / "hf/model.safetensors").read_bytes() != (whole / "hf/model.safetensors").read_bytes():
            found.append("other weights")
        if untimed(self._workspace.metrics(run)) != untimed(self._workspace.metrics(self._whole)):
            found.append("other metrics")
        if _rollouts(ours) != _rollouts(whole):
            found.append("other rollouts")
        if _evaluations(ours) != _evaluations(whole):
            found.append("other evaluations")
        found += [f"left: {path.name}" for path in (ours / "checkpoints").glob("*partial*")]
        return tuple(found)


def _rollouts(folder: Path) -> list[object]:
    return [_untimed(step_lines(path)) for path in steps_in(folder / "rollouts")]


def _untimed(value: Any) -> Any:
    """Without when requests were queued and answered."""
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in ("queued_at", "finished_at")}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def _evaluations(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "eval").glob("*.jsonl")}


def _kill(run: str, part: str, role: str, started: Started, draw: random.Random) -> Trial:
    roles = started.roles()
    if not roles.get(role):
        role = "launcher"  # which is there as long as there is a run
    chosen = draw.choice(sorted(roles.get(role, []), key=lambda process: process.pid))
    with suppress(*GONE):
        chosen.send_signal(signal.SIGKILL)
    if role in GOES_ON:
        status = started.process.wait(LAST_SECONDS)
        wrong = () if status == 0 else (f"ended with status {status}",)
        return Trial(run, part, role, started.ended_within(END_SECONDS), went_on=True, wrong=wrong)
    seconds = started.ended_within(END_SECONDS)
    wrong = [] if seconds is not None else [f"still there after {END_SECONDS:.0f} s: {sorted(started.roles())}"]
    if started.process.poll() == 0:
        wrong.append("status 0")
    wrong += [f"in /dev/shm: {name}" for name in started.left_in_memory()]
    text = started.log.read_text(errors="replace")
    wrong += [f"said: {word}" for word in ("Traceback", IN_USE) if word in text]
    return Trial(run, part, role, seconds, went_on=False, wrong=tuple(wrong))
