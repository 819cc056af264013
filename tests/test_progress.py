"""What whoever watches a run sees: lines that stay clean whatever they are shown on, and the time that is left."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_sr1.cli import main
from megatron_sr1.metrics import Course, JsonlSink, Pace, ProgressSink, StatusFile, StatusSink
from megatron_sr1.metrics.pace import duration
from megatron_sr1.metrics.shown import shown_metrics
from megatron_sr1.metrics.status import FILE, Status, read_status
from megatron_sr1.metrics.watching import View, drawn, look, watch, written
from megatron_sr1.phases import Phases
from megatron_sr1.printable import one_printable_line, printable
from megatron_sr1.report.text_table import TextTable, print_text_table

STEP = {
    "reward/total": 0.25,
    "reward/stream/answer": 0.2,
    "reward/stream/visual": 0.05,
    "accuracy": 0.5,
    "second_pass_accuracy": 0.375,
    "language_shortcut_rate": 0.125,
    "loss/answer/kl": 0.001,
    "loss/visual/kl": 0.0025,
    "entropy": 0.75,
    "first/response_tokens": 212.4,
    "second/response_tokens": 98.0,
    "first/truncated": 0.03125,
    "second/truncated": 0.0,
    "groups/dead": 0.25,
    "tokens_per_second": 14917.5,
    "trained_tokens_per_second": 33000.0,
    "mfu": 0.412,
    "memory/peak_gib": 71.25,
    "grad_norm": 1.0,
}
WORDS = (
    "reward 0.250 (answer 0.200, visual 0.050)  accuracy 0.500/0.375  LSR 0.125  KL 0.001/0.0025  entropy 0.75  "
    "tokens 212/98  cut 3.1%/0.0%  dead 25.0%  generated/s 14,918  trained/s 33,000  MFU 41.2%  memory 71.2 GiB"
)


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(course: Course, phases: Phases | None = None) -> tuple[Pace, Time]:
    clock = Time()
    return Pace(course, phases or Phases(), clock), clock


def console_of(out: io.StringIO, width: int, *, terminal: bool = True, **environment: str) -> Console:
    size = {"width": width, "height": 30} if terminal else {}
    return Console(file=out, force_terminal=terminal, _environ=environment, color_system=None, **size)


def screen(printed: str) -> list[str]:
    """What stands on a terminal at the end: a line that the cursor goes back to is written over."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d*[A-Za-z]|\x1b\[\?25[lh]|\n|\r)", printed):
        if part == "\n":
            lines.append("")
        elif match := re.fullmatch(r"\x1b\[(\d*)A", part):
            del lines[len(lines) - int(match[1] or 1) :]
        elif part == "\r" or part.endswith("K"):
            lines[-1:] = [""]
        elif not part.startswith("\x1b"):
            lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()]


# ---------------------------------------------------------------- the time that is left
def test_the_time_left_is_of_the_median_step_and_counts_checkpoints_and_evaluations() -> None:
    phases = Phases()
    phases._spent["evaluation"] = 50.0  # ahead of the first step
    pace, clock = paced(Course(10, save_every=3, evaluate_every=4, evaluates_after=True), phases)
    assert pace.seconds_left is None and pace.step_seconds is None
    for done, seconds in ((1, 90.0), (2, 10.0), (3, 12.0)):  # the first compiles
        clock.now += seconds
        pace.step_done(done)
    # steps 4 to 10 by the median 12; evaluations ahead of 5 and 9 and after; checkpoints are not known
    assert pace.seconds_left == 7 * 12 + 3 * 50
    clock.now += 5
    assert pace.seconds_left == 7 * 12 + 3 * 50 - 5, "it runs on between steps"
    phases._spent["save"] = 7.0
    clock.now += 10 + 7 - 5
    pace.step_done(4)
    assert pace.step_seconds == 11.0, "the checkpoint is no part of the step"
    assert pace.seconds_left == 6 * 11 + 3 * 50 + 3 * 7
    phases._spent["evaluation"] += 70.0
    clock.now += 70 + 11
    pace.step_done(5)
    assert pace.seconds_left == 5 * 11 + 2 * 60 + 3 * 7, "an evaluation takes the median of both"


def test_a_run_at_its_end_has_nothing_left_but_its_last_checkpoint() -> None:
    assert Course(8, save_every=3).num_saves(8) == 1 and Course(9, save_every=3).num_saves(9) == 1
    assert Course(8, save_every=3).num_saves(0) == 3 and Course(8, evaluate_every=4).num_evaluations(0) == 1
    assert Course(8, evaluate_every=4).num_evaluations(5) == 0 and Course(8).num_saves(2) == 0
    for steps, every, done in itertools.product((1, 7, 9), (1, 3, 4, 20), range(10)):
        course, ends = Course(steps, every, every, heldout_every=every), range(max(done, 1), steps + 1)
        assert course.num_saves(done) == sum(end % every == 0 or end == steps for end in ends)
        between = sum(end % every == 0 for end in ends if end < steps)
        held = sum(end % every == 0 or end == steps for end in range(done + 1, steps + 1))
        assert course.num_evaluations(done) == between + held, course
    pace, clock = paced(Course(3))
    clock.now += 4
    pace.step_done(3)
    assert pace.seconds_left == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (7.4, "0:07"), (754, "12:34"), (11554, "3:12:34"), (184354, "2 d 03:12:34")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------- lines
def test_a_step_is_told_whole() -> None:
    assert "  ".join(shown_metrics(STEP)) == WORDS
    one = {name: value for name, value in STEP.items() if "visual" not in name and "second" not in name}
    assert "  ".join(shown_metrics(one)).startswith("reward 0.250  accuracy 0.500  LSR 0.125  KL 0.001  entropy")
    assert shown_metrics({"loss/sft/nll": 1.5, "mfu": None, "accuracy": float("nan")}) == [
        "loss 1.500",
        "accuracy nan",
        "MFU nan",
    ]


@pytest.mark.parametrize(
    ("terminal", "environment"),
    [
        *((False, environment) for environment in ({}, {"TERM": "dumb"}, {"COLUMNS": "5"}, {"COLUMNS": "0"})),
        *((True, environment) for environment in ({"TERM": "dumb"}, {"COLUMNS": "5"}, {"COLUMNS": "0"})),
    ],
)
def test_where_nothing_can_be_drawn_anew_a_step_is_one_line(terminal: bool, environment: dict[str, str]) -> None:
    out = io.StringIO()
    width = int(environment.get("COLUMNS", 80)) if terminal else 0
    console = console_of(out, width, terminal=terminal, **environment)
    pace, clock = paced(Course(10))
    sink = ProgressSink(4, console, pace)
    for step in (4, 5):
        clock.now += 2.5
        pace.step_done(step + 1)
        sink.write(step, STEP)
    sink.close()
    assert out.getvalue().splitlines() == [
        f"step 5/10  2.5 s/step  0:12 left  {WORDS}",
        f"step 6/10  2.5 s/step  0:10 left  {WORDS}",
    ]


@pytest.mark.parametrize("width", [30, 80, 120, 300])
def test_a_terminal_has_all_of_it_on_lines_that_fit(width: int) -> None:
    out, phases = io.StringIO(), Phases()
    pace, clock = paced(Course(120), phases)
    sink = ProgressSink(4, console_of(out, width), pace, phases)
    try:
        phases.detail = "3 of 8"
        with phases("rollout"):
            for step in range(4, 7):
                clock.now += 30
                pace.step_done(step + 1)
                sink.write(step, STEP)
            shown = screen(out.getvalue())
    finally:
        sink.close()
    whole = " ".join(" ".join(shown).split())
    assert all(len(line) <= width for line in shown), shown
    assert "step 7/120" in whole and ("━" in whole) == (width >= 70)
    if width > 30:
        assert "30 s/step" in whole and "56:30 left" in whole and "rollout 0:00 (3 of 8)" in whole
        assert " ".join(WORDS.split()) in whole
    assert whole.count("step 7/120") == 1, "drawn anew, not again"


def test_what_others_have_written_moves_no_cursor_and_is_no_markup() -> None:
    evil = "\x1b]0;owned\x07[red]x[/red]\r\u202eabc\x9b2J\udcff"
    assert printable(evil) == "\\x1b]0;owned\\x07[red]x[/red]\\r\\u202eabc\\x9b2J\\udcff"
    assert printable("Zeile 1\n\tdie zweite: 你好 👩‍👩‍👧") == "Zeile 1\n\tdie zweite: 你好 👩‍👩‍👧"
    assert one_printable_line("a\n b\x1b") == "a b\\x1b"
    values = {"reward/total": 1.0, f"reward/stream/{evil}": 0.5, "reward/stream/[bold]b": 0.5}
    for terminal in (False, True):
        out, (pace, _) = io.StringIO(), paced(Course(1))
        sink = ProgressSink(0, console_of(out, 200, terminal=terminal), pace)
        sink.write(0, values)
        sink.close()
        assert "[red]x[/red]" in out.getvalue() and "[bold]b" in out.getvalue()
        assert "\x1b]0" not in out.getvalue() and "\x07" not in out.getvalue()


def test_tables_of_names_from_files_move_no_cursor() -> None:
    out, evil = io.StringIO(), "\x1b[2J[red]x"
    print_text_table(console_of(out, 80), TextTable("k", evil, (evil, "n"), ((evil, "1"),)))
    assert "\x1b[2J" not in out.getvalue() and out.getvalue().count("\\x1b[2J[red]x") == 3


# ---------------------------------------------------------------- watch
@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Path, StatusFile, Phases]]:
    """A run of ten steps that has done three."""
    folder, phases = tmp_path / "runs" / "one", Phases()
    folder.mkdir(parents=True)
    with StatusFile(folder, "grpo", 10, phases) as status:
        status.stage("engines", 12.25)
        pace, clock = paced(Course(10))
        sink, metrics = StatusSink(status, pace, 0), JsonlSink(folder / "metrics.jsonl", 0)
        for step in range(3):
            clock.now += 60
            pace.step_done(step + 1)
            metrics.write(step, {**STEP, "accuracy": step / 10})
            sink.write(step, STEP)
        metrics.close()
        status._write()
        yield folder, status, phases


def rewrite(folder: Path, **values: object) -> None:
    tree = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**tree, **values}))


def lines(folder: Path) -> list[str]:
    return written(look(folder))


def test_a_run_at_work_is_shown_with_its_phase_and_its_last_step(run: tuple[Path, StatusFile, Phases]) -> None:
    folder, status, phases = run
    (folder / "eval").mkdir()
    for step, accuracy in ((0, 0.25), (2, 0.5)):
        tree = {"label": "x", "step": step, "summary": {"accuracy": accuracy, "faithful": None}}
        (folder / "eval" / f"step-{step}.json").write_text(json.dumps(tree))
    with phases("evaluation"), phases("engine step"):
        phases.detail = "40 of 100 prompts"
        status._write()
        head, start, step, evaluation = lines(folder)
    assert re.fullmatch(
        rf"{re.escape(str(folder))}: grpo, running for 0:\d\d, evaluation 0:00: engine step \(40 of 100 prompts\)", head
    )
    assert start == "phases: engines 12.2 s"
    assert step.startswith("step 3/10  60 s/step  7:00 left  reward 0.250") and "accuracy 0.200/" in step
    assert evaluation == "evaluated after step 2: accuracy 50.0%"


def test_how_a_run_has_ended_or_not(run: tuple[Path, StatusFile, Phases]) -> None:
    folder, _, _ = run
    shown = look(folder)
    assert not shown.is_over and shown.status is not None
    gone = subprocess.Popen(["true"])
    gone.wait()
    rewrite(folder, process_id=gone.pid)
    assert f"killed: process {gone.pid} on " in lines(folder)[0] and "left" not in lines(folder)[2]
    rewrite(folder, process_id=os.getpid(), process_began="1")
    assert "killed: " in lines(folder)[0], "another process has its number"
    rewrite(folder, process_id=7, process_began="", host="elsewhere", updated=time.time() - 95)
    assert "silent for 1:35: process 7 on elsewhere" in lines(folder)[0]
    rewrite(folder, updated=time.time() - 5)
    assert ": grpo, running for" in lines(folder)[0]
    rewrite(folder, state="failed", reason="disk\x1b[2J full")
    assert lines(folder)[0].endswith("failed 0:05 ago: disk\\x1b[2J full") and not look(folder).is_over
    rewrite(folder, state="stopped")
    assert "stopped 0:05 ago, after" in lines(folder)[0] and "same command" in lines(folder)[0]
    rewrite(folder, state="finished")
    assert look(folder).is_over and "finished 0:05 ago, after" in lines(folder)[0]


def test_the_last_word_of_a_run_is_how_it_ended(tmp_path: Path) -> None:
    for kind, state, reason in (
        (None, "finished", ""),
        (SystemExit, "stopped", ""),
        (KeyboardInterrupt, "stopped", ""),
        (ValueError, "failed", "two lines"),
    ):
        try:
            with StatusFile(tmp_path, "sft", 2, Phases()):
                if kind is not None:
                    raise kind("two\nlines")
        except (SystemExit, KeyboardInterrupt, ValueError):
            pass
        found = read_status(tmp_path)
        assert found is not None and (found.state, found.reason) == (state, reason)
    assert list(tmp_path.iterdir()) == [tmp_path / FILE], "nothing half-written is left"


def test_what_is_not_there_torn_or_damaged_is_said(run: tuple[Path, StatusFile, Phases], tmp_path: Path) -> None:
    folder, _, _ = run
    assert lines(tmp_path / "none") == [f"{tmp_path}/none: not started, there is no such folder yet"]
    (tmp_path / "new").mkdir()
    assert lines(tmp_path / "new") == [f"{tmp_path}/new: not started, no status.json"]
    with pytest.raises(ValueError, match="is a file"):
        look(folder / "metrics.jsonl")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "accu')
    assert "step 3/10" in lines(folder)[2], "a line that is being written"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert "has a line that is not JSON" in lines(folder)[-1]
    whole = json.loads((folder / FILE).read_text())
    odd = [{"state": "\x1b[2J"}, {"process_id": "\x1b[2J"}, {"updated": math.inf}, {"reason": 5, "state": "failed"}]
    texts = ["", "[1]", '{"command": "grpo"}', '{"command": "grpo", "steps": "many"}', '{"steps": 1, "state": 3}']
    for text in [*texts, *(json.dumps({**whole, **change}) for change in odd)]:
        (folder / FILE).write_text(text)
        assert "\x1b" not in "".join(lines(folder))
        assert "of an earlier release, or damaged" in lines(folder)[0] or FILE in lines(folder)[0]
        assert any(FILE in line and "removed" in line for line in lines(folder)[1:]), text


def test_a_run_that_goes_on_shows_no_step_of_before(run: tuple[Path, StatusFile, Phases]) -> None:
    folder, _, _ = run
    rewrite(folder, done=None)
    assert "step 3/10" in lines(folder)[2], "nobody knows better yet"
    rewrite(folder, done=2, going_on=2)
    assert "step 2/10" in lines(folder)[2] and "accuracy 0.100/" in lines(folder)[2]
    rewrite(folder, done=0)
    assert lines(folder)[2].split("  ")[0] == "step 0/10" and "accuracy" not in lines(folder)[2]


@pytest.mark.parametrize("width", [20, 80])
def test_a_terminal_shows_the_same(run: tuple[Path, StatusFile, Phases], width: int) -> None:
    out = io.StringIO()
    console_of(out, width).print(drawn(look(run[0]), width))
    shown = screen(out.getvalue())
    assert all(len(line) <= width for line in shown) and "step 3/10" in " ".join(shown)


def test_watching_tells_each_step_once_and_ends_with_the_run(run: tuple[Path, StatusFile, Phases]) -> None:
    folder, *_ = run
    out, looks = io.StringIO(), list[int]()

    def pause(seconds: float) -> None:
        looks.append(1)
        if len(looks) == 2:
            sink = JsonlSink(folder / "metrics.jsonl", 3)
            sink.write(3, {**STEP, "accuracy": 0.3})
            sink.close()
            rewrite(folder, done=4)
        if len(looks) == 4:
            rewrite(folder, state="finished")

    watch(folder, console_of(out, 0, terminal=False), pause=pause)
    told = out.getvalue().splitlines()
    assert len(looks) == 4 and [line.split("  ")[0] for line in told if line.startswith("step")] == [
        "step 3/10",
        "step 4/10",
    ]
    assert len(told) == 5 and "finished" in told[-1], told


def test_no_step_and_no_evaluation_is_missed_however_files_follow_each_other(
    run: tuple[Path, StatusFile, Phases],
) -> None:
    """Metrics before the status that counts them, two steps between looks, a fault, and a last evaluation."""
    folder, *_ = run
    out, looks = io.StringIO(), list[int]()
    torn = folder / "metrics.jsonl"

    def measure(*steps: int) -> None:
        sink = JsonlSink(torn, steps[0])
        for step in steps:
            sink.write(step, {**STEP, "accuracy": step / 10})
        sink.close()

    def pause(seconds: float) -> None:
        looks.append(1)
        if len(looks) == 1:
            measure(3)
        elif len(looks) == 2:
            rewrite(folder, done=4)
        elif len(looks) == 3:
            measure(4, 5)
            rewrite(folder, done=6)
        elif len(looks) == 4:
            whole = torn.read_bytes()
            torn.write_bytes(whole + b"no json\n")
            kept.append(whole)
        elif len(looks) == 5:
            torn.write_bytes(kept[0])
        else:
            summary = {"accuracy": 0.25, "second_pass_accuracy": 0.5}
            (folder / "eval" / "after.json").write_text(json.dumps({"step": 10, "summary": summary}))
            rewrite(folder, state="finished")

    kept = list[bytes]()
    (folder / "eval").mkdir(exist_ok=True)
    watch(folder, console_of(out, 0, terminal=False), pause=pause)
    told = out.getvalue().splitlines()
    steps = [line.split("  ")[0] for line in told if line.startswith("step")]
    assert steps == [f"step {number}/10" for number in (3, 4, 5, 6)], told
    assert "accuracy 0.400/" in next(line for line in told if line.startswith("step 5/10"))
    assert sum("is not JSON" in line for line in told) == 1
    assert "evaluated after step 10: accuracy 25.0%" in told[-2] and "finished" in told[-1]


def test_the_command_prints_once_or_until_ctrl_c(
    run: tuple[Path, StatusFile, Phases], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, *_ = run
    main(["watch", str(folder), "--once"])
    assert "step 3/10" in capsys.readouterr().out
    main(["watch", str(tmp_path / "none"), "--once"])
    assert "not started" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["watch", str(folder / FILE), "--once"])
    assert stopped.value.code == 2 and "is a file" in capsys.readouterr().err
    command = [sys.executable, "-m", "megatron_sr1.cli", "watch", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None and "grpo, running" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in printed and "Interrupt" not in printed, printed


def test_a_status_is_replaced_as_a_whole(run: tuple[Path, StatusFile, Phases]) -> None:
    folder, status, _ = run
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        status.note(reason="x" * 5000)
        status._write()
        status.note(reason="")
        status._write()
        assert isinstance(read_status(folder), Status)
    assert View(folder, True, replace(read_status(folder) or Status("x", 1), done=None), (), "", ()).done == 0
