"""Looking into a step: traces with named parts, memory of each phase, and what is refused with what to do."""

from __future__ import annotations

import gzip
import json
import re
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sr1.config import Config, ConfigError, ProfileConfig, load_config
from megatron_sr1.phases import Phases
from megatron_sr1.platform import Platform
from megatron_sr1.platform.accelerator import Accelerator
from megatron_sr1.platform.profiling import SESSION, MemoryPhases, StepProfiler, check_profiler
from megatron_sr1.platform.usage import memory_metrics
from megatron_sr1.ranks import ALONE

CPU = Platform(torch.device("cpu"), 0, 1)
CARD = Platform(torch.device("cuda"), 0, 1, Accelerator("NVIDIA H100", (9, 0), "13.0", None))


def profiled(folder: Path, phases: Phases, *, platform: Platform = CPU, kind: Any = "torch", **how: Any) -> list[str]:
    """What three steps say of a profile of the second."""
    said: list[str] = []
    profiler = StepProfiler(ProfileConfig((1,), kind, **how), platform, folder, said.append, phases)
    for step in range(3):
        with profiler(step), phases("train"):
            with phases.marked(lambda: "rollout/first"):
                torch.ones(64, 64) @ torch.ones(64, 64)
            thread = threading.Thread(target=lambda: phases("elsewhere").__enter__())
            thread.start()
            thread.join()
    assert phases.mark is None
    return said


def test_a_trace_has_the_parts_of_the_step_that_was_asked_for(tmp_path: Path) -> None:
    (said,) = profiled(tmp_path, Phases())
    path = tmp_path / "profile" / "step_000001_rank_00000.json.gz"
    assert said.startswith(f"profile of step 2: {path}") and list(path.parent.iterdir()) == [path]
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sorted(names) == ["rollout/first", "train"], "once: of one step, and of the main thread"
    assert any(event["name"] == "aten::mm" for event in events)


def test_a_rank_that_is_not_asked_for_writes_nothing(tmp_path: Path) -> None:
    assert profiled(tmp_path, Phases(), ranks=(1,)) == [] and not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_and_costs_no_step(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file")
    (said,) = profiled(tmp_path, Phases())
    assert said.startswith("profile of step 2 is not written: ")


def test_a_step_that_fails_leaves_no_profiler_behind(tmp_path: Path) -> None:
    phases = Phases()
    profiler = StepProfiler(ProfileConfig((0,)), CPU, tmp_path, print, phases)
    with pytest.raises(SystemExit), profiler(0):
        raise SystemExit(75)
    assert phases.mark is None and not list(tmp_path.iterdir())


def test_memory_of_each_phase_with_the_peaks_of_those_within(tmp_path: Path) -> None:
    (said,) = profiled(tmp_path, Phases(), kind="memory")
    path = tmp_path / "profile" / "step_000001_rank_00000_memory.json"
    assert said == f"profile of step 2: {path}"
    found = json.loads(path.read_text())["phases"]
    assert list(found) == ["rollout/first", "train"] and found["train"]["resident"] > 2**24
    assert found["train"]["allocated"] is None, "absent on a CPU, not 0"

    memory = MemoryPhases(torch.device("cpu"))
    with memory("outer"):
        with memory("large"):
            torch.ones(2**25)  # 128 MiB
        with memory("small"):
            pass
    of = {one.phase: one for one in memory.phases}
    if of["small"].peak_resident is None:
        pytest.skip("this kernel does not reset the high-water mark")
    large, small, outer = (of[name].peak_resident or 0 for name in ("large", "small", "outer"))
    assert large - small > 100 * 2**20 and outer >= large, "what was freed in between is seen, where it was"
    assert outer - of["outer"].resident > 100 * 2**20


def test_a_phase_that_comes_again_keeps_its_highest_numbers(tmp_path: Path) -> None:
    memory = MemoryPhases(torch.device("cpu"))
    for _ in range(2):
        with memory("save"):
            pass
    memory.write(tmp_path / "m.json")
    kept = json.loads((tmp_path / "m.json").read_text())["phases"]["save"]
    assert kept["resident"] == max(one.resident for one in memory.phases)


def test_nsight_gets_a_range_of_the_step_with_named_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextmanager
    def ranged(name: str) -> Any:
        calls.append(f"push {name}")
        yield
        calls.append("pop")

    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", ranged)
    (said,) = profiled(tmp_path, Phases(), platform=CARD, kind="nsys")
    assert calls == ["start", "push train", "push rollout/first", "pop", "pop", "stop"] and "nsys" in said


def test_nsight_is_refused_where_it_would_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SESSION, raising=False)
    asked = ProfileConfig((1,), "nsys")
    check_profiler(ProfileConfig((), "nsys"), CPU)
    check_profiler(ProfileConfig((1,), "torch"), CPU)
    with pytest.raises(ConfigError, match=r"profile\.kind='nsys' needs a GPU.*Set it to torch or memory"):
        check_profiler(asked, CPU)
    with pytest.raises(ConfigError, match="nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi"):
        check_profiler(asked, CARD)
    monkeypatch.setenv(SESSION, "1")
    check_profiler(asked, CARD)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile.steps=[5]", "train.steps=5"], r"profile\.steps.*\[5\].*below train\.steps=5: the first is 0"),
        (["profile.steps=[-1]"], r"profile\.steps=-1 is not allowed.*0"),
        (["profile.steps=[2,2]"], r"profile\.steps.*each number once"),
        (["profile.steps=[1]", "profile.ranks=[1]"], r"profile\.ranks.*below nproc=1"),
        (["profile.kind=perf"], r"profile\.kind.*torch, nsys, memory"),
    ],
)
def test_steps_and_ranks_that_are_not_there_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, words)


def test_a_profile_is_off_unless_steps_are_named() -> None:
    assert Config().profile.steps == () and load_config(None, ["profile.steps=[2, 3]"]).profile.steps == (2, 3)
    assert load_config(None, ["profile.steps=3"]).profile.steps == (3,)
    load_config(None, ["profile.ranks=[7]"])  # of no step


def test_memory_metrics_name_no_device_where_there_is_none() -> None:
    found = memory_metrics(torch.device("cpu"), ALONE)
    assert set(found) == {"memory/host_gib"} and re.fullmatch(r"0\.\d+|\d+\.\d+", str(found["memory/host_gib"]))
    assert found["memory/host_gib"] > 0.05
