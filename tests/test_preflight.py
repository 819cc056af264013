"""Every check of the preflight can fail, none disturbs a run, and the command makes them all on real engines."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sr1.config import Config, ObjectiveConfig, load_config
from megatron_sr1.data import Quarantine, SampleFeed, SampleStream, ShardDataset, StepPrompts, write_shards
from megatron_sr1.loops import first_checks, grpo, preflight
from megatron_sr1.preflight import (
    Row,
    canary_row,
    check_rows,
    demonstrations_row,
    earning_rows,
    gold_groups,
    gold_rows,
    has_passed,
    keep_rows,
    known_rewards,
    logprob_row,
    pixels_row,
    samples_row,
    table_of,
    to_json,
    unearned,
)
from megatron_sr1.prompts import SHIPPED, AnswerFormat, Template, Templates
from megatron_sr1.ranks import ALONE
from megatron_sr1.rewards import Ungraded, score_or_tell
from megatron_sr1.rewards.table import for_prompt
from megatron_sr1.streams import PRESETS, Preset, preset_from_config
from megatron_sr1.training.trainer import NoTrainer
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair, SftSample
from tests.data_cases import QUESTION, prompts, write_tar
from tests.pass_cases import OTHERS
from tests.ranks import run_ranks
from tests.sampled_run import Alone, Runs, texts
from tests.scripted_engine import planner, prompt
from tests.step_cases import rollouts_of
from tests.workspace import REPOSITORY, RUN_TIMEOUT, Workspace


def rows_by_name(rows: Sequence[Row]) -> dict[str, Row]:
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


# ---------------------------------------------------------------- samples, engines
def test_rows_about_samples_and_engines() -> None:
    assert samples_row(4, []).verdict == "pass"
    assert samples_row(3, ["sample 'x': broken"]).verdict == "warn" and "'x'" in samples_row(3, ["'x'"]).found
    assert samples_row(0, ["sample 'x': broken"]).verdict == "fail"
    assert canary_row([]).verdict == pixels_row(4, []).verdict == "pass"
    assert canary_row(["stale", "stale"]) == Row("weights and sleep", "fail", "stale")
    assert pixels_row(4, ["sample 'a': other values", "b"]).verdict == "fail"
    gaps = {"logprob_gap": 0.5, "mismatch/text": 0.5, "mismatch/near_image": 0.7}
    assert logprob_row(gaps, 0.6).verdict == "pass"
    assert logprob_row(gaps, 0.2).verdict == "fail" and "the pictures" in logprob_row(gaps, 0.2).found
    assert logprob_row({**gaps, "logprob_gap": float("nan")}, 0.2).verdict == "fail"
    assert logprob_row(None, 0.2).verdict == "warn"


def test_demonstrations_keep_to_their_layout() -> None:
    good = SftSample(prompt("a"), "cot", r"<think> x </think> \boxed{1}")
    bad = replace(good, response=r"\boxed{1}")
    cases: list[dict[int, SftSample]] = [{0: good}, {0: good, 1: bad}, {0: bad}, {}]
    verdicts = [demonstrations_row(len(own), own, SHIPPED, ALONE).verdict for own in cases]
    assert verdicts == ["pass", "warn", "fail", "warn"]


def test_looking_takes_nothing(tmp_path: Path) -> None:
    written = write_shards(prompts(9), tmp_path, "n", 3)
    broken = write_tar(tmp_path / "bad.tar", {"q.json": {**QUESTION, "images": ["q.0.png"]}, "q.0.png": b"no picture"})
    dataset = ShardDataset([*written, broken])
    quarantine = Quarantine(1)
    with (
        SampleFeed(SampleStream(dataset, 3), quarantine) as feed,
        SampleFeed(SampleStream(dataset, 3), Quarantine(1)) as other,
    ):
        before = feed.state()
        seen, bad = feed.look(10)
        assert len(seen.keys) == 9 and len(bad) == 1 and "q" in bad[0]
        assert feed.state() == before and quarantine.num_bad == 0 and seen.shares == [list(range(9))]
        assert feed.next(9).keys == other.next(9).keys == seen.keys
        assert set(feed.look(3)[0].keys) <= set(seen.keys), "the next ones, of another epoch"


# ---------------------------------------------------------------- gold answers
def graded(groups: Sequence[RolloutGroup], preset: Preset, by: Preset | None = None) -> dict[int, Any]:
    """`by`: whose templates read the responses; None: the preset's own."""
    return {
        group.group_id: score_or_tell(
            group,
            for_prompt(known_rewards(preset), bool(group.prompt.images)),
            asked=(by or preset).asked.of(group.prompt),
        )
        for group in groups
    }


def gold(preset: Preset, *samples: Prompt, by: Preset | None = None) -> list[Row]:
    groups = gold_groups(dict(enumerate(samples)), preset, planner())
    return gold_rows(len(samples), unearned(groups, graded(groups, preset, by), preset), preset)


@pytest.mark.parametrize("name", list(PRESETS))
def test_gold_answers_earn_in_every_preset(name: str) -> None:
    shown = replace(prompt("a"), metadata={"questions": OTHERS, "description": "a dog", "facts": ["3", "1"]})
    first, *others = gold(PRESETS[name], shown, prompt("b", num_images=0))
    assert first.verdict == "pass", first
    assert all(row.verdict == "warn" and "not checked" in row.found for row in others)


def test_later_passes_and_their_other_questions_earn_too() -> None:
    passes = [
        {"name": "second", "samples": 2},
        {"name": "others", "context": "other_description"},
        {"name": "told", "context": "metadata", "field": "description"},
        {"name": "asked", "question": "questions", "samples": 2},
        {"name": "blind", "context": "nothing"},
    ]
    preset = preset_from_config(ObjectiveConfig(passes=passes))
    sample = replace(prompt("a"), metadata={"questions": OTHERS, "description": "a dog"})
    (row,) = gold(preset, sample)
    assert row.verdict == "pass", row
    wrong = replace(sample, metadata={**sample.metadata, "questions": [{**OTHERS[0], "answer": "a}b"}]})
    (row,) = gold(preset, wrong)
    assert row.verdict == "fail" and "acc_vis@asked" in row.found


@pytest.mark.parametrize(
    "answer", [AnswerFormat("tag", "answer"), AnswerFormat("json", "answer"), AnswerFormat("last_line")]
)
def test_templates_of_a_users_own(answer: AnswerFormat) -> None:
    own = Template("own", "{problem}", ("scene", "why"), answer=answer, describes="scene")
    preset = replace(PRESETS["vision_sr1"], template="own", templates=Templates({**SHIPPED.by_name, "own": own}))
    (row,) = gold(preset, replace(prompt("a"), answer='say "1"'))
    assert row.verdict == "pass", row
    opened = replace(own, opens="<scene>")
    preset = replace(preset, templates=Templates({**SHIPPED.by_name, "own": opened}))
    assert gold(preset, prompt("a"))[0].verdict == "pass"


def test_gold_answers_that_cannot_earn() -> None:
    preset = PRESETS["vision_sr1"]
    (other,) = gold(preset, prompt("a"), by=PRESETS["vision_r1"])
    assert other.verdict == "fail" and "fmt gives 0.0" in other.found, "they are graded by another layout"
    odd = [replace(prompt("x"), answer=text) for text in ("a}b", r"\boxed{1}", "1" * 600)]
    assert [gold(preset, one)[0].verdict for one in odd] == ["fail"] * 3
    (few,) = gold(preset, prompt("a"), prompt("b"), odd[0])
    assert few.verdict == "warn" and "1 of 3" in few.found and "sample 'x', answer 'a}b'" in few.found
    groups = gold_groups({0: prompt("a")}, preset, planner())
    (failed,) = gold_rows(1, unearned(groups, {0: Ungraded("its process was killed")}, preset), preset)
    assert failed.verdict == "fail" and "its process was killed" in failed.found
    assert gold_rows(0, [], preset)[0].verdict == "warn"


def test_what_is_not_ours_is_not_passed() -> None:
    own = [{"name": "mine", "rewards": {"tests/test_preflight.py:mine": 1.0}}]
    rows = gold(preset_from_config(ObjectiveConfig(preset="vision_r1", streams=own)), prompt("a"))
    assert [row.verdict for row in rows] == ["pass", "warn"] and "mine" in rows[1].found


def mine(pair: RolloutPair, sample: Prompt) -> float:
    """A reward whose most nobody knows."""
    raise AssertionError("nobody has written this response")


# ---------------------------------------------------------------- can this earn
def pair(number: int, text: str, cut: bool = False) -> RolloutPair:
    ids = tuple(range(5, 5 + len(text.split())))
    length = "length" if cut else "stop"
    return RolloutPair(number, Rollout(f"r{number}", (2, 3), ids, text, (-1.0,) * len(ids), length, 0), None, None)


def earned(
    *groups: Sequence[tuple[str, bool]], preset: Preset = PRESETS["vision_r1"], step: int = 0, **changes: Any
) -> dict[str, Row]:
    made = [
        RolloutGroup(number, prompt(f"p{number}"), tuple(pair(i, *each) for i, each in enumerate(each_group)))
        for number, each_group in enumerate(groups)
    ]
    config = Config(objective=ObjectiveConfig(preset="vision_r1", **changes))
    rollouts = replace(rollouts_of(made, None, preset), step=step)
    return rows_by_name(earning_rows(rollouts, preset, config, ALONE))


GOOD, WRONG, LOOSE = (r"<think> x </think> \boxed{1}", False), (r"<think> x </think> \boxed{2}", False), ("no", False)


def test_what_can_earn_passes() -> None:
    rows = earned((GOOD, WRONG), (GOOD, WRONG))
    assert {row.verdict for row in rows.values()} == {"pass"}, rows
    assert "50% answer correctly" in rows["responses"].found and "100% of" in rows["gradient"].found


@pytest.mark.parametrize(
    ("groups", "failing"),
    [
        (((LOOSE, LOOSE), (LOOSE, LOOSE)), {"dead groups", "reward", "gradient"}),
        (((GOOD, GOOD), (WRONG, WRONG)), {"dead groups", "gradient"}),
    ],
)
def test_what_cannot_earn_is_refused(groups: Any, failing: set[str]) -> None:
    rows = earned(*groups)
    assert {name for name, row in rows.items() if row.verdict == "fail"} == failing
    with pytest.raises(ValueError, match="the preflight failed: dead groups: 100%"):
        check_rows(list(rows.values()))
    later = earned(*groups, step=100)
    assert {name for name, row in later.items() if row.verdict == "warn"} >= failing, "a run that goes on has learnt"


def test_poor_shares_are_warned_of() -> None:
    rows = earned((GOOD, WRONG), (LOOSE, LOOSE), (LOOSE, LOOSE))
    assert (rows["format"].verdict, rows["dead groups"].verdict) == ("warn", "pass")
    rows = earned((GOOD, WRONG), *[(GOOD, GOOD)] * 30)
    assert (rows["dead groups"].verdict, rows["gradient"].verdict) == ("warn", "warn")
    rows = earned(((GOOD[0], True), WRONG))
    assert rows["cut responses"].verdict == "warn" and "first 50%" in rows["cut responses"].found


def test_a_contrast_may_teach_where_rewards_do_not() -> None:
    preset = PRESETS["papo"]
    rows = earned((LOOSE, LOOSE), preset=preset)
    assert any(stream.trains_contrast for stream in preset.streams)
    assert rows["dead groups"].verdict == rows["gradient"].verdict == "warn"


def test_rollouts_that_are_looked_at_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's own steps, on an engine whose answers hang on seeds and weights, with a look before and without."""
    runs, real = Runs(tmp_path, monkeypatch, texts(30)), grpo._steps
    looked: list[Any] = []

    def after_a_look(run: Any, first: int, preset: Any, feed: Any, policy: Any, source: Any, *rest: Any) -> None:
        looked.append(source.look(StepPrompts(feed, 6, taken=False), first))
        source.sleep()
        real(run, first, preset, feed, policy, source, *rest)

    plain = runs.go("plain")
    monkeypatch.setattr(grpo, "_steps", after_a_look)
    other = runs.go("looked")
    (seen,) = looked
    assert seen.ledger.num_groups == 6 and not (tmp_path / "looked/rollouts/step_000006").exists()
    assert plain.number == other.number and plain.trained == other.trained
    for step in range(6):
        assert untimed_lines(runs, "plain", step) == untimed_lines(runs, "looked", step)


def untimed_lines(runs: Runs, name: str, step: int) -> list[Any]:
    clocks = ("queued_at", "finished_at")
    lines = runs.lines(name, step)
    return [{**line, "first": {k: v for k, v in line["first"].items() if k not in clocks}} for line in lines]


# ---------------------------------------------------------------- what is kept, and said
def test_a_preflight_is_known_by_its_configuration(tmp_path: Path) -> None:
    path, good, bad = tmp_path / "run" / "preflight.json", Row("a", "warn", "x"), Row("b", "fail", "y", "Do z.")
    config = load_config(None, [])
    assert not has_passed(path, config)
    keep_rows(path, config, [good], whole=True)
    assert has_passed(path, config) and json.loads(path.read_text())["verdict"] == "warn"
    assert has_passed(path, replace(config, timeout_minutes=3.0)), "which changes no number"
    assert not has_passed(path, load_config(None, ["rollout.temperature=0.5"]))
    keep_rows(path, config, [good], whole=False)
    assert has_passed(path, config), "what was known of responses stays known"
    keep_rows(path, config, [good, bad], whole=True)
    assert not has_passed(path, config) and json.loads(path.read_text())["rows"][1]["remedy"] == "Do z."
    keep_rows(path, config, [good], whole=False)
    assert not has_passed(path, config), "machines alone were checked since"
    path.write_text('{"passed": tr')
    assert not has_passed(path, config)


def test_a_table_names_what_to_do() -> None:
    rows = [Row("disk", "pass", "room"), Row("open files", "fail", "12", "ulimit -n 65536."), Row("c", "warn", "hm")]
    assert table_of(rows).splitlines() == [
        "pass  disk        room",
        "fail  open files  12",
        "                  -> ulimit -n 65536.",
        "warn  c           hm",
        "1 pass, 1 warn, 1 fail",
    ]
    assert json.loads(to_json(rows))["verdict"] == "fail"
    check_rows(rows[:1])
    with pytest.raises(ValueError, match=r"open files: 12\. ulimit -n 65536\. .*enabled=false"):
        check_rows(rows)


class Scripted:
    """`Checks` whose rows are given, and which notes what it was asked for."""

    def __init__(self, machines: Row, responses: Row) -> None:
        self.rows: list[Row] = []
        self.asked: list[str] = []
        self._machines, self._responses = machines, responses

    @property
    def failed(self) -> bool:
        return any(row.verdict == "fail" for row in self.rows)

    def machines(self, policy: Any, num_steps: int) -> None:
        self.rows.append(self._machines)

    def engines(self, complaints: Sequence[str]) -> None:
        self.rows.append(canary_row(complaints))

    def responses(self, *arguments: Any) -> None:
        self.asked.append("responses")
        self.rows.append(self._responses)

    demonstrations = responses


GONE, FINE = Row("disk space", "fail", "none", "Make room."), Row("disk space", "pass", "much")


def begun(
    folder: Path, patch: pytest.MonkeyPatch, *settings: str, rows: tuple[Row, Row] = (FINE, FINE), again: bool = False
) -> tuple[first_checks.Preflight, Scripted, list[str]]:
    """The first phase of a run on one rank, and what it says. `again`: the run goes on from a checkpoint."""
    said: list[str] = []
    checks = Scripted(*rows)
    patch.setattr(first_checks, "Checks", lambda *arguments, generates: checks)
    platform = SimpleNamespace(is_main=True, ranks=Alone(), on_main=lambda work: work())
    config = load_config(None, [f"run_dir={folder}", *settings])
    run: Any = SimpleNamespace(
        folder=folder, config=config, platform=platform, say=said.append, progress=object() if again else None
    )
    return first_checks.Preflight(run, "grpo"), checks, said


def go_through(preflight: first_checks.Preflight, complaint: str = "", trainer: Any = None) -> None:
    nothing: Any = None
    preflight.machines(nothing, 200)
    if complaint:
        preflight.complain(complaint)
    preflight.responses(nothing, nothing, trainer, 0)
    preflight.close()


def test_a_run_ends_where_a_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight, checks, said = begun(tmp_path / "a", monkeypatch, rows=(GONE, FINE))
    with pytest.raises(ValueError, match=r"the preflight failed: disk space: none\. Make room\."):
        go_through(preflight)
    assert checks.asked == [], "no engine was started"
    assert json.loads((tmp_path / "a/preflight.json").read_text())["passed"] is False
    assert said == ["preflight, fail: disk space: none. Make room."]
    preflight, checks, _ = begun(tmp_path / "b", monkeypatch)
    with pytest.raises(ValueError, match="weights and sleep: it serves stale images"):
        go_through(preflight, "it serves stale images")
    assert checks.asked == ["responses"], "all checks are made"


def test_a_run_that_goes_on_asks_nothing_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*settings: str, **how: Any) -> list[str]:
        preflight, checks, said = begun(tmp_path, monkeypatch, *settings, **how)
        go_through(preflight)
        assert len(said) == 1 and "checks passed" in said[0]
        return checks.asked

    assert asked("preflight.prompts=0") == []
    assert asked(again=True) == ["responses"], "machines alone were looked at"
    assert asked(again=True) == []
    assert asked() == ["responses"], "it begins again"
    assert asked("rollout.temperature=0.5", again=True) == ["responses"]
    assert asked(again=True) == ["responses"], "the last was of another configuration"
    preflight, checks, _ = begun(tmp_path, monkeypatch, again=True)
    (tmp_path / "preflight.json").unlink()
    go_through(preflight, trainer=NoTrainer())
    assert checks.asked == ["responses"] and asked(again=True) == ["responses"], "no log-probs were compared"


def test_a_preflight_that_is_switched_off_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight, checks, said = begun(tmp_path, monkeypatch, "preflight.enabled=false", rows=(GONE, GONE))
    go_through(preflight)
    assert said == checks.rows == checks.asked == list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="stale"):
        preflight.complain("stale")


def test_what_ends_the_checks_has_not_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    platform: Any = SimpleNamespace(is_main=True, on_main=lambda work: work())
    watching: list[Path] = []

    @contextmanager
    def watched(run: Any, folder: Path) -> Iterator[None]:
        watching.append(folder)
        yield
        watching.clear()

    def interrupted(run: Any, checks: Any) -> None:
        assert watching == [run.folder], "a rank that hangs is found here as in a run"
        checks.rows.append(Row("clocks", "pass", "all"))
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "watched", watched)
    monkeypatch.setattr(preflight, "_check_sft", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preflight.run_preflight(load_config(None, []), platform, command="sft", as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "fail" and printed["rows"][-1]["name"] == "further checks"


@pytest.mark.parametrize(("verdict", "room"), [("fail", False), ("warn", True)])
def test_no_engine_is_started_without_shared_memory(verdict: Any, room: bool) -> None:
    run: Any = SimpleNamespace(platform=SimpleNamespace(is_main=True, ranks=Alone()))
    checks = first_checks.Checks(run, "grpo", load_config(None, []))
    checks.rows.append(Row("shared memory", verdict, "8 MiB free"))
    assert checks.engines_have_room() is room
    assert [row.name for row in checks.rows[1:]] == [] if room else ["engines"]


# ---------------------------------------------------------------- real ones
def test_the_command_on_real_engines(workspace: Workspace) -> None:
    run = workspace.folder / "preflighted"
    (run / "checkpoints").mkdir(parents=True)
    words = workspace.command("preflight", "preflighted", "--json", "preflight.prompts=3", "nproc=1", "layout.tensor=1")
    done = subprocess.run(words, cwd=REPOSITORY, timeout=RUN_TIMEOUT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert {
        "versions",
        "clocks",
        "ports",
        "host memory",
        "disk space",
        "write speed",
        "weights and sleep",
    } <= rows.keys()
    assert {"pixels and ids", "gold answers", "format", "leak", "gradient", "log-probs"} <= rows.keys()
    assert all(row["verdict"] != "fail" for row in rows.values())
    assert [path.name for path in run.iterdir()] == ["checkpoints"] and not list((run / "checkpoints").iterdir())


def test_a_run_begins_with_it(finished: Workspace) -> None:
    """`whole`, whose bits those runs repeat that other tests stop, and which begin without it."""
    kept = json.loads((finished.folder / "whole" / "preflight.json").read_text())
    assert kept["passed"] is True and len(kept["rows"]) > 15
    assert not (finished.folder / "sft" / "preflight.json").exists(), "which was switched off"
    (disk,) = [row["found"] for row in kept["rows"] if row["name"] == "disk space"]
    expected = re.search(r"a checkpoint takes about (\d+) MiB", disk)
    files = (finished.folder / "whole" / "checkpoints" / "step_000008").rglob("*")
    found = sum(path.stat().st_size for path in files if path.is_file()) / 2**20
    assert expected is not None and abs(found - int(expected[1])) < 1.5, (disk, found)


def test_an_engine_with_other_weights_fails(workspace: Workspace) -> None:
    words = workspace.command("grpo", "other_weights")[5:]
    run_ranks(
        1, _other_weights, [*words, "nproc=1", "layout.tensor=1", "preflight.prompts=2", "preflight.enabled=true"]
    )


def _other_weights(rank: int, num_ranks: int, words: list[str]) -> None:
    from megatron_sr1.platform import start_platform

    platform = start_platform()
    from megatron_sr1.loops.first_checks import Checks
    from megatron_sr1.loops.generation import build_generator, live_rollouts, training_feed, training_sampling
    from megatron_sr1.loops.run import Run
    from megatron_sr1.policy import Policy
    from megatron_sr1.streams import preset_of
    from megatron_sr1.training.recorder import Recorder
    from megatron_sr1.training.trainer import Trainer

    config = load_config(REPOSITORY / "examples/quickstart/grpo.yaml", words)
    preset, run = preset_of(config), Run(config, platform)
    sampling = training_sampling(config, preset)
    policy = Policy(config, platform, num_optimizer_steps=1, keep_reference=preset.needs_reference)
    trainer = Trainer(config, policy, preset, run.processor)
    generator = build_generator(run, policy.hf_weights)
    generator.update_weights(((name, tensor * 1.02) for name, tensor in policy.hf_weights()), 0)
    checks = Checks(run, "grpo", config, preset)
    recorder = Recorder.of(preset, config.rollout.samples_per_prompt, run.processor, "train")
    source = live_rollouts(run, generator, sampling, recorder, refreshed=True)
    with training_feed(run, preset, sampling) as feed, source:
        checks.responses(feed, source, trainer, 0)
    rows = {row.name: row for row in checks.rows}
    assert rows["log-probs"].verdict == "fail" and "another policy" in rows["log-probs"].found, rows["log-probs"]
    assert rows["pixels and ids"].verdict == rows["gold answers"].verdict == "pass"
