"""gpu-check's runner and its result, with checks that pass, fail, hang and lack something: it goes on, keeps its
budget, writes what is known however it ends, and nothing of where it was made."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import private, runner
from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.private import scrubbed
from benchmarks.gpu_check.processes import run_limited
from benchmarks.gpu_check.report import Figure, Report, Table
from benchmarks.gpu_check.result import Result, free_stem
from benchmarks.gpu_check.runner import Budget, Check, Outcome, run_checks
from tests.gpu_check_cases import driver, fake

REPOSITORY = Path(__file__).resolve().parent.parent


def _run(
    checks: list[Check], work: Path, seconds: float = 60.0, cuda: bool | None = False
) -> tuple[dict[str, Outcome], list[list[str]]]:
    """Outcomes by name, and what was told after each check."""
    told: list[list[str]] = []
    outcomes, stopped = run_checks(
        checks, work, Budget(seconds), lambda done: cuda, lambda found: told.append([o.status for o in found])
    )
    assert not stopped
    return {outcome.check.name: outcome for outcome in outcomes}, told


def _is_alive(pid: int) -> bool:
    """A zombie is not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _only(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


# ---------------------------------------------------------------- how a check ends
def test_every_end_has_its_status_and_the_next_check_runs(tmp_path: Path) -> None:
    names = ("breaks", "is_wrong", "lacks", "skips_without_a_word", "is_killed", "passes")
    found, told = _run([*map(fake, names), fake("takes_a_second", needs_cuda=True)], tmp_path)
    status = {name: outcome.status for name, outcome in found.items()}
    assert status == {
        "breaks": "failed",
        "is_wrong": "failed",
        "lacks": "absent",
        "skips_without_a_word": "failed",  # the status alone says nothing: a reason belongs to it
        "is_killed": "failed",
        "passes": "passed",
        "takes_a_second": "absent",
    }
    assert found["breaks"].reason == "exit status 1" and "FileNotFoundError" in found["breaks"].tail
    assert found["is_wrong"].reason == "1 is not 2" and found["is_wrong"].report.figures == {"found": 1}
    assert found["lacks"].reason == "no such package" and found["takes_a_second"].reason == runner.NO_CUDA
    assert found["is_killed"].reason == "ended by SIGKILL"
    assert found["passes"].report.figures["GB/s"] == 1.5 and not found["passes"].tail
    assert told[0] == ["failed", *["not run"] * 6] and told[-1] == list(status.values())


def test_what_is_not_known_of_cards_is_tried(tmp_path: Path) -> None:
    check = Check("cards", "", fake("passes").command, 60, needs_cuda=True)
    assert _run([check], tmp_path / "a", cuda=None)[0]["cards"].status == "passed"
    assert _run([check], tmp_path / "b", cuda=True)[0]["cards"].status == "passed"


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For checks that ignore SIGTERM."""
    monkeypatch.setattr("benchmarks.gpu_check.processes.GRACE_SECONDS", 0.3)


@pytest.mark.usefixtures("short_grace")
def test_a_check_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    found, _ = _run([fake("hangs", limit_s=1.5), fake("passes")], tmp_path)
    outcome = found["hangs"]
    assert (
        outcome.status == "out of time" and outcome.reason == "ended after 2 s, its own" and outcome.tail == "waiting"
    )
    child = int((tmp_path / "hangs" / "child").read_text())
    assert _eventually(lambda: not _is_alive(child)) and found["passes"].status == "passed"


def test_a_check_that_is_ended_ends_what_is_in_another_group(tmp_path: Path) -> None:
    """As a run that is to be killed is, and with it all its ranks: SIGTERM lets its `finally` run."""
    code = f"""
import subprocess, sys, time, types
from pathlib import Path
from benchmarks.gpu_check import one
def run(folder):
    child = subprocess.Popen(["sleep", "600"], process_group=0)
    Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
    try:
        time.sleep(600)
    finally:
        child.kill()
sys.modules["benchmarks.gpu_check.sleeps"] = types.SimpleNamespace(run=run)
sys.exit(one.main())
"""
    command = (sys.executable, "-c", code, "sleeps")
    found, _ = _run([Check("sleeps", "", command, 2.0)], tmp_path / "work")
    assert found["sleeps"].status == "out of time"
    assert _eventually(lambda: not _is_alive(int((tmp_path / "child").read_text())))


def test_what_a_check_leaves_behind_is_ended(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    assert run_limited([sys.executable, "-c", code], tmp_path / "log", 60, tmp_path) == 0
    assert _eventually(lambda: not _is_alive(int((tmp_path / "log").read_text())))


@pytest.mark.usefixtures("short_grace")
def test_the_budget_cuts_a_check_short_and_says_what_did_not_run(tmp_path: Path) -> None:
    found, _ = _run([fake("hangs"), fake("passes"), fake("lacks", needs_cuda=True)], tmp_path, seconds=1.5)
    assert found["hangs"].status == "out of time" and found["hangs"].reason.endswith("what the budget had left")
    assert found["passes"].status == "not run" and found["passes"].reason == "budget: all 2 s are used"
    assert found["lacks"].status == "absent"  # that takes no time


# ---------------------------------------------------------------- the command
def test_the_command_writes_one_result_and_its_exit_status(tmp_path: Path) -> None:
    fine = [fake("environment"), fake("passes"), fake("lacks"), fake("hangs", needs_cuda=True)]
    assert main(["--out", str(tmp_path / "fine")], fine, tmp_path / "work") == 0
    result = _only(tmp_path / "fine")
    assert result["fine"] and [check["status"] for check in result["checks"]] == [
        "passed",
        "passed",
        "absent",
        "absent",
    ]
    assert result["checks"][1]["figures"] == {"GB/s": 1.5, "odd": "nan"}
    assert main(["--out", str(tmp_path / "bad")], [*fine, fake("is_wrong")], tmp_path / "work") == 1
    assert not _only(tmp_path / "bad")["fine"]
    (page,) = (tmp_path / "fine").glob("*.md")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-cpu", page.stem)
    text = page.read_text()
    assert "| passes | passed |" in text and "| GB/s | 1.5 |" in text and r"| x\|y |  |" in text


def test_only_some_are_run_with_the_environment_and_the_result_says_so(tmp_path: Path) -> None:
    checks = [fake("environment"), fake("breaks"), fake("passes")]
    assert main(["--only", "passes", "--out", str(tmp_path / "out")], checks, tmp_path / "work") == 0
    result = _only(tmp_path / "out")
    assert [check["name"] for check in result["checks"]] == ["environment", "passes"]
    assert result["asked_for"] == ["passes"]
    for words in (["--only", "nothing"], ["--minutes", "0"], ["--minutes", "nan"], ["--out", __file__]):
        with pytest.raises(SystemExit) as refused:
            main(words, checks, tmp_path / "work")
        assert refused.value.code == 2


def test_a_result_is_never_written_over(tmp_path: Path) -> None:
    for expected in ("2025-01-02-nvidia-h100", "2025-01-02-nvidia-h100-2", "2025-01-02-nvidia-h100-3"):
        stem = free_stem(tmp_path, "2025-01-02", "NVIDIA H100")
        assert stem.name == expected
        stem.with_name(f"{stem.name}.md").touch()
    assert free_stem(tmp_path, "2025-01-02", "///").name == "2025-01-02-unknown"


def test_ctrl_c_ends_the_check_and_writes_what_is_known(tmp_path: Path) -> None:
    names = ("environment", "passes", "hangs", "breaks")
    process = subprocess.Popen(driver(names, tmp_path / "work", tmp_path / "out"), cwd=REPOSITORY)
    child = tmp_path / "work" / "hangs" / "child"
    assert _eventually(lambda: child.exists() and child.read_text() != "")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    result = _only(tmp_path / "out")
    status = {check["name"]: check["status"] for check in result["checks"]}
    assert status == {"environment": "passed", "passes": "passed", "hangs": "not run", "breaks": "not run"}
    assert not result["fine"] and "it was stopped before" in {check["reason"] for check in result["checks"]}
    assert _eventually(lambda: not _is_alive(int(child.read_text())))


def test_a_killed_command_leaves_what_it_knew_and_the_next_one_starts(tmp_path: Path) -> None:
    process = subprocess.Popen(
        driver(("environment", "passes", "hangs"), tmp_path / "work", tmp_path / "out"), cwd=REPOSITORY
    )
    child = tmp_path / "work" / "hangs" / "child"
    assert _eventually(lambda: child.exists() and child.read_text() != "")
    assert main(["--out", str(tmp_path / "other")], [fake("passes")], tmp_path / "work") == 1  # it is at work there
    assert not (tmp_path / "other").exists()
    process.kill()
    process.wait()
    os.killpg(os.getpgid(int(child.read_text())), signal.SIGKILL)
    assert [check["status"] for check in _only(tmp_path / "out")["checks"]] == ["passed", "passed", "not run"]
    assert main(["--out", str(tmp_path / "other")], [fake("passes")], tmp_path / "work") == 0


# ---------------------------------------------------------------- what the result does not say
def test_a_version_of_four_parts_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_versions", lambda: frozenset({"9.19.0.56"}))
    assert scrubbed("cudnn 9.19.0.56 on 9.19.0.57", {}) == "cudnn 9.19.0.56 on <address>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"File {REPOSITORY}/megatron_sr1/types.py", "File ./megatron_sr1/types.py"),
        (f'"{sys.prefix}/lib/python3.11/site.py", line 3', '"<environment>/lib/python3.11/site.py", line 3'),
        (f"{Path.home()}/models", "~/models"),
        ("saved to /scratch/project_7/me/run/hf, 3 files", "saved to …/hf, 3 files"),
        ("data.train=[/mnt/x/train-*.tar]", "data.train=[…/train-*.tar]"),
        ("under /scratch now", "under … now"),
        ("1.5 GB/s, tokens/s, 10/20 and a/b; ./relative/x.py", "1.5 GB/s, tokens/s, 10/20 and a/b; ./relative/x.py"),
        ("from https://user:pw@host.example/simple/x now", "from <address> now"),
        ("rank 0 on 10.1.22.3:29500", "rank 0 on <address>"),
        ("torch 2.14.0+cu130, CUDA 13.0", "torch 2.14.0+cu130, CUDA 13.0"),
        ("API_KEY=abc123 and hf_token: 'xyz'", "API_KEY=<secret> and hf_token: <secret>'"),
        ("it said hunter2hunter2 twice", "it said <secret> twice"),
    ],
)
def test_paths_addresses_and_secrets_are_taken_out(text: str, expected: str) -> None:
    assert scrubbed(text, {"MY_PASSWORD": "hunter2hunter2", "HOME_TOKEN": "x"}) == expected
    assert scrubbed(expected, {}) == expected


def test_nothing_in_a_result_says_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "correct-horse-battery")
    told = f"{tmp_path}/a correct-horse-battery {REPOSITORY}/b {sys.executable} https://x.example/y"
    figures: dict[str, Figure] = {"file": told, f"of {tmp_path}/c": 1}
    report = Report(figures, [Table(told, (told,), [(told,)])])
    outcome = Outcome(fake("breaks"), "failed", 1.0, told, report, f'  File "{sys.executable}"\n{told}')
    Result("2025-01-02", [told], 60, 1, [outcome]).write(tmp_path / "out" / "result")
    for path in (tmp_path / "out").iterdir():
        text = path.read_text()
        leaks = (str(tmp_path), str(REPOSITORY), sys.prefix, str(Path.home()) + "/", "correct-horse", "x.example")
        assert [leak for leak in leaks if leak in text] == [] and "<secret>" in text
        assert re.findall(r"(?<![\w.~>…])/\w+/", text) == []


# ---------------------------------------------------------------- make
@pytest.mark.parametrize(("environment", "expected"), [(".venv-gpu", ".venv-gpu"), ("", ".venv")])
def test_make_takes_the_environment_for_cards_where_there_is_one(
    environment: str, expected: str, tmp_path: Path
) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    if environment:
        (tmp_path / environment / "bin").mkdir(parents=True)
        (tmp_path / environment / "bin" / "python").touch()
    words = ["make", "--dry-run", "--no-print-directory", "--old-file=setup", "gpu-check", "ARGS=--only trace"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(words, cwd=tmp_path, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"{expected}/bin/python -m benchmarks.gpu_check --only trace"
