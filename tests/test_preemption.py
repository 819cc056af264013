"""A run that is asked to stop: it saves, leaves with the documented status, and goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from megatron_sr1.cli import main
from tests.commands import call_forked
from tests.workspace import REPOSITORY, Workspace, untimed

STOPPED = 75  # EX_TEMPFAIL of sysexits.h
DEADLINE = 200  # seconds, for something that is sure to come
SFT = ("train.steps=null", "train.epochs=0.12", "train.batch_size=8", "train.save_every=100")  # 6 steps of 400 samples
GRPO = ("train.steps=8", "train.save_every=100")  # before the end nothing would be saved but for the request


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert happened(), process.communicate()[0][-4000:]


def listens_at(process: psutil.Process) -> set[str]:
    """The addresses at which it and what it has started take connections."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found |= {at.laddr.ip for at in one.net_connections("inet") if at.status == psutil.CONN_LISTEN}
    return found


def stop_midway(
    workspace: Workspace,
    name: str,
    run: str,
    overrides: tuple[str, ...],
    stop: Callable[[psutil.Process], None],
    after: int = 2,
) -> tuple[int, str]:
    """Asks a run to stop after so many steps; its status and what it printed."""
    command = workspace.command(name, run, *overrides)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True, start_new_session=True, **pipe)
    metrics = workspace.folder / run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= after, process)
    assert listens_at(psutil.Process(process.pid)) <= {"127.0.0.1", "::1"}
    stop(psutil.Process(process.pid))
    printed, _ = process.communicate(timeout=DEADLINE)
    return process.returncode, printed


def check_it_stopped(workspace: Workspace, run: str, status: int, printed: str, steps: int) -> None:
    assert status == STOPPED, printed[-4000:]
    assert "Traceback" not in printed and "asked to stop: saved after step" in printed
    done = max(int(path.name.removeprefix("step_")) for path in (workspace.folder / run / "checkpoints").iterdir())
    assert 2 <= done < steps and len(workspace.metrics(run)) == done
    assert not (workspace.folder / run / "hf").exists()


def weights(workspace: Workspace, run: str) -> bytes:
    return (workspace.folder / run / "hf" / "model.safetensors").read_bytes()


def ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    servers = [child for child in launcher.children() if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    return [rank for server in servers for rank in server.children()]


def srun_task(words: list[str], job_id: str) -> None:
    """One of the two tasks that srun starts: it has srun's variables alone, and makes the group by them."""
    number = str(torch.distributed.get_rank())
    torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    step = {"SLURM_JOB_ID": job_id, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": number, "SLURM_LOCALID": number}
    os.environ.update(step | {"GLOO_SOCKET_IFNAME": "lo"})
    main(words)


REWARD = """
from pathlib import Path
from megatron_sr1.prompts import extract_boxed
from megatron_sr1.rewards import grade

def acc(pair, prompt):
    if (Path(__file__).parent / "fails").exists() and pair.first.rollout_id.startswith("2/"):
        raise RuntimeError("in the third step")
    answer = extract_boxed(pair.first.response_text)
    return float(answer is not None and grade(answer, prompt.answer, prompt.choices))
"""
STREAMS = """
- {name: answer, rewards: {"%s:acc": 1.0, fmt: 0.1}, loss_weight: 0.5}
- {name: visual, pass: second, rewards: {acc_vis: 1.0, fmt_vis: 0.1}, loss_weight: 0.5}
"""


def test_grpo_stops_at_a_reward_that_fails_at_a_word_to_one_rank_and_at_ctrl_c(
    finished: Workspace, tmp_path: Path
) -> None:
    """The run is trained on `vision_sr1` as a list, with a reward out of a file, and ends with the bits of the preset.

    The word is SIGUSR1, as before Slurm's time limit, to the rank that is not the main one. Ctrl-C is SIGINT to the
    whole process group, as a terminal sends it; the graders and engines of a rank hear it, too.
    """
    file, fails = tmp_path / "mine.py", tmp_path / "fails"
    file.write_text(REWARD)
    streams = yaml.safe_dump(yaml.safe_load(STREAMS % file), default_flow_style=True, width=1000).strip()
    grpo = (*GRPO, "objective.preset=null", f"objective.streams={streams}")

    fails.touch()
    command = finished.command("grpo", "asked", *grpo)
    failed = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=DEADLINE)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr[-4000:]
    last = failed.stderr.strip().splitlines()[-1]
    assert f"the reward '{file}:acc' failed on response" in last and f"at {file}:8 in acc: RuntimeError: in the" in last
    assert "saved after step 2" in failed.stdout and len(finished.metrics("asked")) == 2
    fails.unlink()

    def tell_the_last_rank(launcher: psutil.Process) -> None:
        assert len(ranks_of(launcher)) == 2
        ranks_of(launcher)[-1].send_signal(signal.SIGUSR1)

    status, printed = stop_midway(finished, "grpo", "asked", grpo, tell_the_last_rank, after=3)
    check_it_stopped(finished, "asked", status, printed, steps=8)
    assert "continuing after step 2" in printed

    def press(launcher: psutil.Process) -> None:
        os.killpg(launcher.pid, signal.SIGINT)

    status, printed = stop_midway(finished, "grpo", "asked", grpo, press, after=5)
    check_it_stopped(finished, "asked", status, printed, steps=8)
    assert "KeyboardInterrupt" not in printed

    assert "continuing after step" in finished.run_forked("grpo", "asked", *grpo)
    entries = untimed(finished.metrics("asked"))
    assert all(entry.pop("reward/mine.acc") == entry["reward/acc"] for entry in entries)
    assert entries == untimed(finished.metrics("whole"))
    assert weights(finished, "asked") == weights(finished, "whole")
    assert finished.summary("asked", "after")["reward/mine.acc"] == finished.summary("whole", "after")["accuracy"]
    (kept,) = json.loads((finished.folder / "asked" / "code" / "index.json").read_text()).values()
    assert (finished.folder / "asked" / "code" / kept).read_text() == REWARD


def test_sft_stops_when_every_process_is_signalled(workspace: Workspace) -> None:
    """SIGTERM to the launcher and all ranks at once, as Slurm does it; the launcher passes it on too. It goes on as two
    tasks of srun, by the variables that srun would set. What is measured of held-out demonstrations is the same, too.
    """
    sft = (*SFT, "train.heldout_every=2", "evaluate.max_prompts=12")
    sft = (*sft, f"data.heldout=[{workspace.folder}/data/cold_start-*.tar]")
    workspace.run_forked("sft", "sft_whole", *sft)

    def tell_everyone(launcher: psutil.Process) -> None:
        os.killpg(launcher.pid, signal.SIGTERM)

    status, printed = stop_midway(workspace, "sft", "sft_asked", sft, tell_everyone)
    check_it_stopped(workspace, "sft_asked", status, printed, steps=6)
    call_forked(srun_task, workspace.command("sft", "sft_asked", *sft)[3:], str(os.getpid()), num_ranks=2)
    assert untimed(workspace.metrics("sft_asked")) == untimed(workspace.metrics("sft_whole"))
    assert weights(workspace, "sft_asked") == weights(workspace, "sft_whole")
    measured = [entry.get("heldout/loss") for entry in workspace.metrics("sft_whole")]
    assert [loss is not None for loss in measured] == [False, True] * 3 and measured[1] > measured[3] > measured[5]


DEAF = """
import signal
import time
from pathlib import Path
from megatron_sr1.loops.preemption import watch_for_stop
from megatron_sr1.platform import run_on_ranks, start_platform

def step(folder):
    platform = start_platform()
    with watch_for_stop(platform) as stop:
        receive = signal.getsignal(signal.SIGUSR1)

        def receive_and_note(number, frame):
            receive(number, frame)
            with (Path(folder) / f"usr1_{platform.rank}").open("a") as file:
                file.write(".")

        signal.signal(signal.SIGUSR1, receive_and_note)
        (Path(folder) / f"ready{platform.rank}").touch()
        for number in range(1200):  # one step that takes two minutes
            time.sleep(0.1)
            if stop._received:
                (Path(folder) / f"asked{platform.rank}").touch()

if __name__ == "__main__":
    import sys
    run_on_ranks(step, int(sys.argv[2]), sys.argv[1], imports=["megatron_sr1.policy"])  # once for both ranks
"""


@pytest.mark.parametrize(("num_ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_second_request_ends_at_once(num_ranks: int, number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "deaf.py"
    script.write_text(DEAF)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(tmp_path), str(num_ranks)]
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ranks = range(num_ranks)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in ranks), process)
    children = ranks_of(psutil.Process(process.pid))
    assert len(children) == (num_ranks if num_ranks > 1 else 0)

    process.send_signal(number)
    wait_for(lambda: all((tmp_path / f"asked{rank}").exists() for rank in ranks), process)
    process.send_signal(signal.SIGUSR1)
    wanted = "." * num_ranks  # a launcher passes the first on as SIGUSR1 too
    noted = [tmp_path / f"usr1_{rank}" for rank in ranks]
    wait_for(lambda: all(path.exists() and path.read_text() == wanted for path in noted), process)
    assert process.poll() is None, "asked twice is still asked: the step may end"
    start = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=20)
    assert time.monotonic() - start < 15
    assert process.returncode in (-number, 128 + number)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


OUTSIDE = """
import sys, time
from pathlib import Path
from megatron_sr1.platform import run_on_ranks

def wait(path):
    Path(path).touch()
    time.sleep(60)

if __name__ == "__main__":
    run_on_ranks(wait, 1, sys.argv[1])
"""


def test_a_rank_alone_that_is_asked_outside_its_steps_says_so_and_ends(tmp_path: Path) -> None:
    script, ready = tmp_path / "waits.py", tmp_path / "ready"
    script.write_text(OUTSIDE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(ready)]
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(ready.exists, process)
    process.terminate()
    said, _ = process.communicate(timeout=20)
    assert process.returncode == STOPPED and said.startswith("asked to stop outside of the steps")


def test_the_status_is_the_one_the_launcher_looks_for() -> None:
    from megatron_sr1.platform import STOPPED_STATUS

    assert STOPPED_STATUS == STOPPED
