"""A run that is disturbed again and again: rerun by the same command, and compared with an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from megatron_sr1.platform import STOPPED_STATUS
from megatron_sr1.platform.watchdog import HUNG_STATUS
from megatron_sr1.training.rollout_files import step_lines, steps_in
from tests.faults.damage import DAMAGES, possible
from tests.faults.moments import Moments
from tests.faults.processes import GONE, Started
from tests.workspace import Workspace, untimed

END_SECONDS = 10.0  # from a kill until nothing of the run is left
STOP_SECONDS = 120.0  # from a polite request: the step is ended and saved
HANG_SECONDS = 60.0  # from a stop: a rank is silent for a while, then all say where they stood
LAST_SECONDS = 900.0  # for what goes on
GOES_ON = ("grader", "child of a grader", "resource tracker")  # a run survives the loss of one


@dataclass(frozen=True)
class Fault:
    """What is to happen."""

    part: str  # of the run
    role: str  # of the process
    number: signal.Signals = signal.SIGKILL
    damage: str = ""  # to the run's folder, when all is over; see `DAMAGES`


@dataclass(frozen=True)
class Trial:
    """What came of a fault."""

    run: str
    fault: Fault
    seconds: float | None = None  # until nothing of the run was left; None: too long, or the run went on
    went_on: bool = False  # the run was not ended by it
    wrong: tuple[str, ...] = ()  # what should not be


class Chains:
    """Runs that are to end like `whole`, in the same workspace and with the same words."""

    def __init__(
        self,
        workspace: Workspace,
        whole: str,
        words: Sequence[str],
        moments: Moments | None,
        end_seconds: float = END_SECONDS,
    ) -> None:
        """
        Args:
            end_seconds: in place of END_SECONDS, where other work has the processors.
        """
        self._workspace, self._whole, self._words, self._moments = workspace, whole, tuple(words), moments
        self._end_seconds = end_seconds

    def start(self, run: str, attempt: int) -> Started:
        """The command of a run."""
        command = self._workspace.command("grpo", run, *self._words)
        return Started(command, self._workspace.folder / f"{run}.{attempt}.log")

    def disturb(self, run: str, faults: Sequence[Fault], draw: random.Random) -> list[Trial]:
        """Starts a run once for each fault, and lets it end. The last trial bears what is wrong with the end."""
        assert self._moments is not None
        trials: list[Trial] = []
        for attempt, fault in enumerate(faults):
            started = self.start(run, attempt)
            try:
                if not self._moments.wait_for(fault.part, run, started, draw):
                    status = started.process.wait(LAST_SECONDS)
                    if status:
                        trials.append(Trial(run, fault, wrong=self._said(started, status)))
                    break  # the part does not come any more: the run is done
                trials.append(_disturbed(run, fault, started, draw, self._end_seconds))
            finally:
                started.close()
            trials[-1] = self._damaged(trials[-1], draw)
        return [*trials[:-1], self._ended(run, trials[-1], len(faults))] if trials else []

    def _damaged(self, trial: Trial, draw: random.Random) -> Trial:
        folder, damage = self._workspace.folder / trial.run, trial.fault.damage
        if damage and (trial.went_on or damage not in possible(folder)):
            damage = ""
        if damage:
            DAMAGES[damage](folder, draw)
        return replace(trial, fault=replace(trial.fault, damage=damage))

    def _ended(self, run: str, last: Trial, attempt: int) -> Trial:
        started = self.start(run, attempt)
        try:
            status = started.process.wait(LAST_SECONDS)
            wrong = self._said(started, status) if status else self.differences(run)
            if started.ended_within(self._end_seconds) is None:
                wrong += (f"left: {sorted(started.roles())}",)
        finally:
            started.close()
        return replace(last, wrong=(*last.wrong, *wrong))

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
    rollouts = folder / "rollouts"
    measured = {path.name: path.read_bytes() for path in rollouts.glob("*.tokens.*")}
    return [measured, *(_untimed(step_lines(path)) for path in steps_in(rollouts))]


def _untimed(value: Any) -> Any:
    """Without when requests were queued and answered."""
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in ("queued_at", "finished_at")}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def _evaluations(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "eval").glob("*.jsonl")}


def _disturbed(run: str, fault: Fault, started: Started, draw: random.Random, end_seconds: float) -> Trial:
    roles = started.roles()
    if not roles.get(fault.role):
        fault = replace(fault, role="launcher")  # which is there as long as there is a run
    number = fault.number
    if number == signal.SIGSTOP and (fault.role != "rank" or len(roles.get("rank", [])) < 2):
        number = signal.SIGKILL
    fault = replace(fault, number=number)
    _send(number, draw.choice(sorted(roles[fault.role], key=lambda process: process.pid)), started)
    if fault.role in GOES_ON:
        status = started.process.wait(LAST_SECONDS)
        wrong = () if status == 0 else (f"ended with status {status}",)
        return Trial(run, fault, started.ended_within(end_seconds), went_on=True, wrong=wrong)
    limit = {signal.SIGKILL: end_seconds, signal.SIGSTOP: HANG_SECONDS}.get(number, STOP_SECONDS)
    seconds = started.ended_within(limit)
    wrong = [] if seconds is not None else [f"still there after {limit:.0f} s: {sorted(started.roles())}"]
    if seconds is not None and started.process.poll() not in _statuses(number, fault.role):
        wrong.append(f"status {started.process.poll()}")
    wrong += [f"in /dev/shm: {name}" for name in started.left_in_memory()]
    text = started.log.read_text(errors="replace")
    wrong += [f"said: {word}" for word in ("Traceback", "in use by another process") if word in text]
    return Trial(run, fault, seconds, wrong=tuple(wrong))


def _send(number: signal.Signals, process: psutil.Process, started: Started) -> None:
    """Ctrl-C reaches all processes in the foreground."""
    with suppress(*GONE, ProcessLookupError):
        if number == signal.SIGINT:
            os.killpg(started.process.pid, number)
        else:
            process.send_signal(number)


def _statuses(number: signal.Signals, role: str) -> tuple[int, ...]:
    """Those that a launcher may end with."""
    if number == signal.SIGKILL:
        return (-number,) if role == "launcher" else (128 + number, 255)
    if number == signal.SIGSTOP:
        return (HUNG_STATUS,)
    return (STOPPED_STATUS, 0, -number, 128 + number)  # 0: it was done before it could be asked
