"""Looks into steps of a run: a trace of torch.profiler, a range for Nsight Systems, or the memory of each phase.

What is being done is named by the phases of the main thread (`phases.during`): rollout, rollout/first, rollout/second,
reward, reference, train, sync, save.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_sr1.config import ConfigError, ProfileConfig
from megatron_sr1.phases import Phases, during
from megatron_sr1.platform.runtime import Platform
from megatron_sr1.platform.torch_private import dump_allocations, record_allocations
from megatron_sr1.platform.usage import resident_bytes, take_peak

FOLDER = "profile"
SESSION = "NSYS_PROFILING_SESSION_ID"  # which Nsight Systems sets for what it starts
NSYS = "nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=repeat"
SNAPSHOTS = ("rollout", "reward", "train", "sync", "save")  # phases with a snapshot of the device's allocations


def check_profiler(config: ProfileConfig, platform: Platform) -> None:
    """
    Raises:
        ConfigError: Nsight Systems is asked for and is not there, or nothing for it to see.
    """
    if not config.steps or config.kind != "nsys":
        return
    if platform.on_cpu:
        raise ConfigError("profile.kind='nsys' needs a GPU, and this rank runs on the CPU. Set it to torch or memory.")
    if not os.environ.get(SESSION):
        raise ConfigError(
            f"profile.kind='nsys' needs Nsight Systems around the command, and {SESSION} is not set. Start it with "
            f"{NSYS} megatron-sr1 ..., or set profile.kind to torch."
        )


class StepProfiler:
    """Of one rank. `with profiler(step):` around a step does nothing unless that is asked for."""

    def __init__(
        self,
        config: ProfileConfig,
        platform: Platform,
        run_dir: Path,
        say: Callable[[str], None],
        phases: Phases = during,
    ) -> None:
        """`say`: takes a line when something is written, or cannot be: the run goes on."""
        self._steps = frozenset(config.steps if platform.rank in config.ranks else ())
        self._kind, self._device, self._rank = config.kind, platform.device, platform.rank
        self._folder, self._say, self._phases = run_dir / FOLDER, say, phases

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Raises ValueError where another profiler is at work."""
        if step not in self._steps:
            yield
            return
        if self._phases.mark is not None:
            raise ValueError("another profiler is at work in this process")
        name = f"step_{step:06d}_rank_{self._rank:05d}"
        looked: dict[str, Callable[[str], AbstractContextManager[Callable[[], str]]]] = {
            "torch": self._traced,
            "nsys": self._captured,
            "memory": self._measured,
        }
        with ExitStack() as stack:
            told = stack.enter_context(looked[self._kind](name))
            try:
                yield
            finally:
                self._phases.mark = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._say(f"profile of step {step + 1}: {told()}")
        except (OSError, RuntimeError) as error:  # a full disk: what is looked into is not worth the run
            self._say(f"profile of step {step + 1} is not written: {error}")

    @contextmanager
    def _traced(self, name: str) -> Iterator[Callable[[], str]]:
        on_card = self._device.type != "cpu"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]) as found:
            self._phases.mark = record_function
            yield lambda: self._export(found, name)

    def _export(self, found: profile, name: str) -> str:
        path, partial = self._folder / f"{name}.json.gz", self._folder / f"{name}.part.json.gz"
        found.export_chrome_trace(str(partial))
        os.replace(partial, path)
        return f"{path}, for https://ui.perfetto.dev"

    @contextmanager
    def _captured(self, name: str) -> Iterator[Callable[[], str]]:
        torch.cuda.profiler.start()
        try:
            self._phases.mark = torch.cuda.nvtx.range
            yield lambda: "in the file that nsys writes"
        finally:
            torch.cuda.profiler.stop()

    @contextmanager
    def _measured(self, name: str) -> Iterator[Callable[[], str]]:
        memory = MemoryPhases(self._device, self._snapshots(name))
        on_card = self._device.type != "cpu"
        if on_card:
            record_allocations(on=True)
        try:
            self._phases.mark = memory
            yield lambda: memory.write(self._folder / f"{name}_memory.json")
        finally:
            if on_card:
                record_allocations(on=False)

    def _snapshots(self, name: str) -> Callable[[str], None]:
        """Called at the end of a phase."""

        def keep(phase: str) -> None:
            if self._device.type == "cpu" or phase not in SNAPSHOTS:
                return
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                dump_allocations(str(self._folder / f"{name}_{phase}.pickle"))
            except (OSError, RuntimeError) as error:
                self._say(f"profile: the snapshot of {phase} is not written: {error}")

        return keep


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of a phase; None: this machine does not tell."""

    phase: str
    resident: int  # of the process, at its end
    peak_resident: int | None
    allocated: int | None  # of the device, at its end; None on a CPU
    peak_allocated: int | None


class MemoryPhases:
    """Measures the phases that it is told of, which may be within each other."""

    def __init__(self, device: torch.device, ended: Callable[[str], None] = lambda phase: None) -> None:
        self.phases: list[PhaseMemory] = []
        self._device, self._ended = device, ended
        self._open: list[list[int | None]] = []  # of each phase that is open: its peaks so far

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._note()
        self._open.append([None, None])
        try:
            yield
        finally:
            self._note()
            peak_resident, peak_allocated = self._open.pop()
            on_cpu = self._device.type == "cpu"
            allocated = None if on_cpu else torch.cuda.memory_allocated(self._device)
            self.phases.append(PhaseMemory(phase, resident_bytes(), peak_resident, allocated, peak_allocated))
            self._ended(phase)

    def write(self, path: Path) -> str:
        """By phase; of those that came several times the highest."""
        most: dict[str, dict[str, int | None]] = {}
        for one in self.phases:
            kept = most.setdefault(one.phase, {})
            for name, value in asdict(one).items():
                if name != "phase":
                    known = kept.get(name)
                    kept[name] = value if known is None else max(known, value or 0)
        tree = {"unit": "bytes", "phases": most}
        partial = path.with_name(f"{path.name}.part")
        partial.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return str(path)

    def _note(self) -> None:
        """The peaks since the last look belong to every phase that is open."""
        found = (_take_peak_resident(), self._take_peak_allocated())
        for peaks in self._open:
            peaks[:] = [
                new if old is None else old if new is None else max(old, new)
                for old, new in zip(peaks, found, strict=True)
            ]

    def _take_peak_allocated(self) -> int | None:
        return None if self._device.type == "cpu" else take_peak(self._device)


def _take_peak_resident() -> int | None:
    """The most since this was asked last; None where Linux does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("VmHWM:"))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark counts anew, proc(5)
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) * 1024
