"""What a step costs under each objective, side by side: seconds, CPU seconds, memory and processes of all that it
takes, the server of an external reader included.

    make study                      # the cold start and the data that it asks for by default
    python -m benchmarks.step_cost examples/study/grpo.yaml --presets see_think vision_sr1 external_reasoner

Each preset trains --steps steps with next to no evaluation, on the same prompts; the presets take turns, --rounds
times. `external_reasoner` reads descriptions with the model of the start behind vLLM's own server, which is started on
loopback and counts. The first steps warm up: the numbers are of the steps behind the second, from its line in
metrics.jsonl to the last one's.

    seconds     wall time of a step; CPU seconds: of the run, its engine and graders, and the server
    memory      most resident memory of all processes together, MiB: pages that they share count once (PSS)
    processes   most at once
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from megatron_sr1.config import load_config
from megatron_sr1.parent_process import end_with_parent

WARM_UP = 2  # steps that are not counted
READER = "reader"  # the name that the server knows its model by
POLL_SECONDS = 0.1
READY_SECONDS = 300.0
END_SECONDS = 20.0  # for the server to end by itself
_STOPPED_WITH_THIS = partial(end_with_parent, signal.SIGTERM)


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    seconds: float  # a step
    cpu_seconds: float  # a step
    memory: float  # MiB, at most
    processes: int  # at most


class Watch:
    """CPU seconds, memory and number of the processes under some, those that have ended included."""

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = [psutil.Process(root) for root in roots]
        self._cpu: dict[tuple[int, float], float] = {}
        self.memory = 0.0
        self.processes = 0

    def look(self, memory: bool) -> float:
        """CPU seconds so far, of each process up to when it was last seen."""
        alive, resident = 0, 0
        for process in self._all():
            try:
                times = process.cpu_times()
                self._cpu[process.pid, process.create_time()] = times.user + times.system
                resident += process.memory_full_info().pss if memory else 0
                alive += 1
            except psutil.Error:
                continue  # it has just ended
        self.memory, self.processes = max(self.memory, resident / 2**20), max(self.processes, alive)
        return sum(self._cpu.values())

    def _all(self) -> Iterator[psutil.Process]:
        for root in self._roots:
            try:
                yield from (root, *root.children(recursive=True))
            except psutil.Error:
                continue


def measure(config: str, preset: str, steps: int, overrides: Sequence[str], roots: Sequence[int]) -> Cost:
    """Trains `steps` steps in a folder that is removed.

    Args:
        roots: other processes that belong to the run.

    Raises:
        RuntimeError: the run failed; with the end of what it printed.
    """
    folder = Path(tempfile.mkdtemp(prefix="step_cost"))
    words = [
        f"objective.preset={preset}",
        f"train.steps={steps}",
        f"run_dir={folder / 'run'}",
        "evaluate.max_prompts=1",
        "evaluate.controls=[]",
        "preflight.enabled=false",
    ]
    command = [sys.executable, "-m", "megatron_sr1.cli", "grpo", config, *words, *overrides]
    try:
        with (folder / "log").open("wb") as log:
            run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_STOPPED_WITH_THIS)
        watch = Watch([run.pid, *roots])
        marks, looks = {}, 0  # lines of metrics.jsonl -> when that many were first seen, and the CPU seconds by then
        while run.poll() is None:
            cpu, looks = watch.look(memory=looks % 10 == 0), looks + 1
            marks.setdefault(_num_lines(folder / "run" / "metrics.jsonl"), (time.monotonic(), cpu))
            time.sleep(POLL_SECONDS)
        counted = sorted(number for number in marks if number >= WARM_UP)
        if run.returncode != 0 or len(counted) < 2:
            tail = (folder / "log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{' '.join(command)} ended with status {run.returncode}:\n{tail}")
        (start, cpu_start), (end, cpu_end) = marks[counted[0]], marks[counted[-1]]
        number = counted[-1] - counted[0]
        return Cost((end - start) / number, (cpu_end - cpu_start) / number, watch.memory, watch.processes)
    finally:
        shutil.rmtree(folder)


@contextmanager
def reader_server(model: str) -> Iterator[tuple[str, int]]:
    """vLLM's server of a model on loopback: its address and its process.

    Raises:
        RuntimeError: it ended, or was not ready in READY_SECONDS.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", READER, "--dtype", "float32"]
    words += ["--enforce-eager", "--max-model-len", "256", "--limit-mm-per-prompt", '{"image": 0, "video": 0}']
    words += ["--kv-cache-memory-bytes", str(2**27), "--max-num-seqs", "256", "--block-size", "32"]
    alone = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | alone,
            start_new_session=True,
            preexec_fn=_STOPPED_WITH_THIS,  # it ends its own processes on SIGTERM
        )
        try:
            address = f"http://127.0.0.1:{port}/v1"
            until = time.monotonic() + READY_SECONDS
            while not _answers(f"{address}/models"):
                if server.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    tail = log.read()[-3000:].decode(errors="replace")
                    raise RuntimeError(f"the reader's server is not there (status {server.poll()}):\n{tail}")
                time.sleep(POLL_SECONDS)
            yield address, server.pid
        finally:
            server.terminate()  # asked, it takes its shared memory back
            with suppress(subprocess.TimeoutExpired):
                server.wait(END_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def costs(
    config: str, presets: Sequence[str], steps: int, rounds: int, overrides: Sequence[str]
) -> dict[str, list[Cost]]:
    """By preset, those of each round."""
    found: dict[str, list[Cost]] = {preset: [] for preset in presets}
    model = load_config(config, overrides).model.hf_dir
    for _ in range(rounds):
        for preset in presets:
            if preset == "external_reasoner":
                with reader_server(model) as (address, pid):
                    asked = [f"rewards.judge.url={address}", f"rewards.judge.model={READER}"]
                    asked += ["rewards.judge.parameters={temperature: 1.0, max_tokens: 64}"]
                    found[preset].append(measure(config, preset, steps, [*overrides, *asked], [pid]))
            else:
                found[preset].append(measure(config, preset, steps, overrides, []))
    return found


def table(found: dict[str, list[Cost]]) -> str:
    """Markdown: medians over the rounds, and the CPU seconds beside those of the first preset."""
    lines = [
        "| objective | s a step | CPU s a step | of the first | memory, MiB | processes |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    first = statistics.median(cost.cpu_seconds for cost in next(iter(found.values())))
    for preset, all_costs in found.items():
        seconds, cpu, memory = (
            statistics.median(getattr(cost, name) for cost in all_costs)
            for name in ("seconds", "cpu_seconds", "memory")
        )
        most = max(cost.processes for cost in all_costs)
        lines.append(f"| {preset} | {seconds:.2f} | {cpu:.2f} | {cpu / first:.2f} | {memory:.0f} | {most} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="examples/study/grpo.yaml")
    parser.add_argument("--presets", nargs="+", default=["see_think", "vision_sr1", "external_reasoner"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--out", type=Path, help="the numbers of every round, as JSON")
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP or options.rounds < 1:
        parser.error(f"--steps must be more than {WARM_UP}, which warm up, and --rounds 1 or more.")
    found = costs(options.config, options.presets, options.steps, options.rounds, options.overrides)
    print(table(found))
    if options.out is not None:
        options.out.write_text(
            json.dumps({name: [vars(one) for one in each] for name, each in found.items()}, indent=1)
        )


if __name__ == "__main__":
    main()
