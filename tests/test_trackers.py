"""Trackers: what a run sends is there, under one run, also when the run continues; and no key is left anywhere."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator
from wandb.proto import wandb_internal_pb2

from megatron_sr1.config import Config, ConfigError, load_config
from megatron_sr1.config.tracking import check_trackers
from megatron_sr1.metrics import MetricsWriter, Trackers, background, read_jsonl, send_evaluations, tracking
from megatron_sr1.metrics.samples import COLUMNS, LONGEST_TEXT, SampleRow, as_code, png_of
from megatron_sr1.metrics.tracking import evaluation_metrics, parameters

SECRET = "0123456789abcdef0123456789abcdef01234567"
EVIL = "[red]x[/red] \x1b[2J ![p](http://example.invalid/p.png) <b>bold</b> | cell"
SHOWN = (3, 5)  # steps whose samples are
SAMPLES = ("track.samples.every=2", "track.samples.count=2")


def config_of(folder: Path, *overrides: str) -> Config:
    track = [
        "track.wandb.mode=offline",
        "track.wandb.project=digits",
        f"track.mlflow.uri=sqlite:///{folder}/mlflow.db",
        "track.mlflow.experiment=ablations",
    ]
    return load_config(None, [f"run_dir={folder}/ablation/one", "objective.preset=gdpo", *track, *overrides])


def evaluate(config: Config, label: str, step: int, accuracy: float) -> None:
    folder = Path(config.run_dir) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"accuracy": accuracy, "faithful": None, "interval": [0.1, 0.9], "num_prompts": 40}
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (900, 30), "blue").save(folder / "images" / "0000_0.png")
    example = {
        "key": "q1",
        "problem": "Sum?",
        "answer": "3",
        "images": ["eval/images/0000_0.png", "eval/images/gone.png"],
    }
    example |= {"first": EVIL, "second": None, "description": f"{label} seen", "rewards": {"acc": 1.0}}
    tree = {"label": label, "step": step, "summary": summary, "examples": [example, example, example]}
    (folder / f"{label}.json").write_text(json.dumps(tree))


def rows(step: int) -> list[SampleRow]:
    """One with two images, and one without."""
    images = tuple(png_of(Image.new("RGB", (1024, 16), color)) for color in ("red", "lime"))
    whole = SampleRow(
        "a", "What?", "7", EVIL, f"described at {step}", "second", {"blind 1": "no"}, {"acc": 0.5}, images
    )
    return [whole, SampleRow("b", "Why?", "8", "first", rewards={"acc": 0.0})]


def train(config: Config, start: int, stop: int) -> None:
    folder, console = Path(config.run_dir), Console(file=io.StringIO())
    how = {"further": (trackers := Trackers(config),), "samples": trackers}
    with trackers, MetricsWriter(folder, start, 10, console, **how) as writer:
        for step in range(start, stop):
            writer.write(step, {"reward/total": step / 2, "loss": float("nan") if step == 1 else 1.0})
            writer.show(step, rows(step) if step in SHOWN else [])


def mlflow_runs(config: Config) -> list[MlflowRun]:
    client = MlflowClient(tracking_uri=config.track.mlflow.uri)
    experiment = client.get_experiment_by_name(config.track.mlflow.experiment)
    return list(client.search_runs([experiment.experiment_id]))


def mlflow_points(config: Config, name: str) -> list[tuple[int, float]]:
    client, (run,) = MlflowClient(tracking_uri=config.track.mlflow.uri), mlflow_runs(config)
    return sorted({(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)})


def wandb_records(config: Config) -> list[wandb_internal_pb2.Record]:
    """Every record of every file, in the order that `wandb sync` would upload them. A file may be closed a moment after
    its run has ended: its last record tells."""
    records = []
    for path in sorted((Path(config.run_dir) / "wandb").glob("offline-run-*/*.wandb")):
        deadline, found = time.monotonic() + 30, []
        while not any(record.HasField("exit") for record in found):
            assert time.monotonic() < deadline, f"{path} does not end"
            found = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_log(path.read_bytes())]
            time.sleep(0.01)
        records += found
    return records


def leveldb_log(data: bytes, block: int = 32768) -> list[bytes]:
    """The records of a log in LevelDB's format behind W&B's header of 7 bytes. A record is fragments of: checksum (4),
    length (2), kind (1: whole, 2: first, 3: middle, 4: last), bytes; none crosses a block or begins in its last 6."""
    assert data[:4] == b":W&B"
    records, position, parts = [], 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records


def wandb_points(config: Config, name: str) -> list[tuple[int, float]]:
    points = set()
    for record in wandb_records(config):
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if name in items:
            points.add((json.loads(items["step"]), json.loads(items[name])))
    return sorted(points)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of six steps, stopped after the fourth with a checkpoint of the third, evaluated before and after."""
    config = config_of(tmp_path_factory.mktemp("tracked"), *SAMPLES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.delenv("WANDB_DATA_DIR", raising=False)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
        patch.setattr(sys, "argv", ["/home/someone/bin/megatron-sr1", "grpo", "my config.yaml", "train.steps=6"])
        evaluate(config, "before", 0, 0.25)
        with pytest.raises(RuntimeError, match="power"):
            interrupted(config)
        assert mlflow_runs(config)[0].info.status == "FAILED"
        train(config, 3, 6)
        evaluate(config, "after", 6, 0.75)
        send_evaluations(config)
    return config


def interrupted(config: Config) -> None:
    folder, console = Path(config.run_dir), Console(file=io.StringIO())
    with Trackers(config) as trackers, MetricsWriter(folder, 0, 10, console, further=(trackers,)) as writer:
        for step in range(4):
            writer.write(step, {"reward/total": step / 2, "loss": float("nan") if step == 1 else 1.0})
        raise RuntimeError("power")


@pytest.fixture
def folder(tracked: Config, tmp_path: Path) -> Path:
    """With a store of an experiment without runs: MLflow takes seconds to make one."""
    store = Path(tracked.run_dir).parent.parent / "mlflow.db"
    shutil.copy(store, tmp_path / "mlflow.db")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    for run in mlflow_runs(config_of(tmp_path)):
        client.delete_run(run.info.run_id)
    return tmp_path


def test_every_step_is_in_both_trackers_as_in_the_file(tracked: Config) -> None:
    expected = [(step, step / 2) for step in range(6)]
    entries = read_jsonl(Path(tracked.run_dir) / "metrics.jsonl")
    assert [(entry["step"], entry["reward/total"]) for entry in entries] == expected
    assert wandb_points(tracked, "reward/total") == expected
    assert mlflow_points(tracked, "reward/total") == expected
    assert [step for step, _ in mlflow_points(tracked, "loss")] == [0, 2, 3, 4, 5], "the one that is not finite is not"


def test_a_run_that_continues_stays_one_run(tracked: Config) -> None:
    (run,) = mlflow_runs(tracked)
    assert run.info.status == "FINISHED" and run.info.run_name == "ablation/one"
    state = json.loads((Path(tracked.run_dir) / "trackers.json").read_text())
    assert state["mlflow"]["run_id"] == run.info.run_id
    started = [record.run for record in wandb_records(tracked) if record.HasField("run")]
    assert len(started) >= 3, "started, continued, and again for the last evaluation"
    assert {run.run_id for run in started} == {state["wandb"]["run_id"]}
    assert {(run.project, run.display_name) for run in started} == {("digits", "ablation/one")}
    exits = [record.exit.exit_code for record in wandb_records(tracked) if record.HasField("exit")]
    assert exits == [1, 0, 0]


def test_a_run_that_is_asked_to_stop_is_no_failure(folder: Path) -> None:
    config = config_of(folder)
    with pytest.raises(SystemExit), Trackers(config):
        raise SystemExit(75)
    assert [run.info.status for run in mlflow_runs(config)] == ["KILLED"]
    assert [record.HasField("preempting") for record in wandb_records(config)].count(True) == 1


def test_evaluations_are_sent_once(tracked: Config) -> None:
    assert wandb_points(tracked, "eval/accuracy") == mlflow_points(tracked, "eval/accuracy") == [(0, 0.25), (6, 0.75)]
    records = len(wandb_records(tracked))
    send_evaluations(tracked)
    assert len(wandb_records(tracked)) == records, "nothing is new"
    assert "eval/interval" not in mlflow_runs(tracked)[0].data.metrics


def wandb_tables(config: Config) -> dict[str, list[tuple[dict[str, Any], dict[str, Path]]]]:
    """By name the tables, each with its files by their names in it: the run's own file is a summary without images."""
    found: dict[str, list[tuple[dict[str, Any], dict[str, Path]]]] = {}
    for record in wandb_records(config):
        if record.HasField("artifact"):
            files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            (name,) = (path for path in files if path.endswith(".table.json"))
            assert all(path.is_relative_to(config.run_dir) for path in files.values()), "nothing waits elsewhere"
            found.setdefault(name.removesuffix(".table.json"), []).append((json.loads(files[name].read_text()), files))
    return found


def test_wandb_has_tables_with_images_in_its_files(tracked: Config) -> None:
    tables = wandb_tables(tracked)
    assert {name: len(found) for name, found in tables.items()} == {"samples/rollouts": 2, "samples/eval": 2}
    for table, files in tables["samples/rollouts"]:
        assert table["columns"] == ["image_0", "image_1", *COLUMNS]
        (red, lime, *texts), (none, _, *others) = table["data"]
        assert texts[:4] == ["a", "What?", "7", EVIL] and texts[6:] == ["blind 1: no", "acc 0.5"]
        assert none is None and others[:4] == ["b", "Why?", "8", "first"]
        images = [Image.open(files[image["path"]]).convert("RGB") for image in (red, lime)]
        assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 255, 0)] and images[0].width == 512
    examples = [table["data"] for table, _ in tables["samples/eval"]]
    assert sorted(data[0][-4] for data in examples) == ["after seen", "before seen"]
    assert all(len(data) == 2 and data[0][0]["_type"] == "image-file" for data in examples), "track.samples.count"
    history = {item.key or "/".join(item.nested_key) for r in wandb_records(tracked) for item in r.history.item}
    assert {"samples/rollouts/path", "samples/eval/path"} <= history


def test_mlflow_has_tables_with_images_in_its_store(tracked: Config, tmp_path: Path) -> None:
    client, (run,) = MlflowClient(tracking_uri=tracked.track.mlflow.uri), mlflow_runs(tracked)
    tables = [entry["path"] for entry in json.loads(run.data.tags["mlflow.loggedArtifacts"])]
    rollouts = [f"samples/rollouts/step_{step:06d}.json" for step in SHOWN]
    assert sorted(tables) == sorted([*rollouts, "samples/eval/step_000000.json", "samples/eval/step_000006.json"])
    for name in tables:
        table = json.loads(Path(client.download_artifacts(run.info.run_id, name, str(tmp_path))).read_text())
        cells = dict(zip(table["columns"], table["data"][0], strict=True))
        assert cells["first"] == EVIL and cells["image_0"]["type"] == "image"
        image = client.download_artifacts(run.info.run_id, cells["image_0"]["filepath"], str(tmp_path))
        assert Image.open(image).size[0] == 512
    assert not Path("mlruns").exists(), "what an SQLite file keeps lies beside it"


def test_tensorboard_has_images_and_texts_as_text(tracked: Config) -> None:
    folder = Path(tracked.run_dir) / "tensorboard" / "samples"
    events = event_accumulator.EventAccumulator(str(folder), {"tensors": 0, "images": 0})
    events.Reload()
    assert {"samples/rollouts/0/image_0", "samples/rollouts/0/image_1", "samples/eval/0/image_0"} <= set(
        events.Tags()["images"]
    )
    shown = events.Images("samples/rollouts/0/image_1")
    assert [event.step for event in shown] == list(SHOWN) and shown[0].width == 512
    assert Image.open(io.BytesIO(shown[0].encoded_image_string)).convert("RGB").getpixel((9, 3)) == (0, 255, 0)
    text = events.Tensors("samples/rollouts/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"**first**\n\n    {EVIL}\n" in text, "indented, so that nothing in it is Markdown"
    assert [event.step for event in events.Tensors("samples/eval/0/text_summary")] == [0, 6]


def test_texts_of_samples_are_shown_whole_or_with_their_length() -> None:
    assert as_code("a\n# b") == "    a\n    # b\n" and as_code("") == "    \n"
    cells = SampleRow("k", "q", "a", "x" * (LONGEST_TEXT + 1)).cells()
    assert cells["first"].endswith(f"... ({LONGEST_TEXT + 1} characters)") and cells["second"] == ""


def test_a_tracker_that_fails_with_samples_is_said_once_and_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MlflowClient, "log_image", full)
    config = config_of(folder, "track.wandb.mode=disabled", *SAMPLES)
    with Trackers(config) as trackers:
        for step in range(3):
            trackers.show(step, rows(step))
            trackers.write(step, {"loss": 1.0})
    (line,) = capsys.readouterr().err.splitlines()
    assert "tracker mlflow" in line and "No space left" in line
    assert [step for step, _ in mlflow_points(config, "loss")] == [0, 1, 2]


TRACKIO = """
import sys
from tests.test_trackers import *
train(load_config(None, sys.argv[1:]), 3, 6)
"""


def test_trackio_has_points_and_tables_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the library reads its folder when it is imported."""
    pytest.importorskip("trackio")
    words = [f"run_dir={tmp_path}/one", "track.trackio.enabled=true", "track.trackio.project=digits", *SAMPLES]
    code = [sys.executable, "-c", TRACKIO, *words]
    done = subprocess.run(code, check=True, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", ""), "it has nothing to say"
    with sqlite3.connect(tmp_path / "one" / "trackio" / "digits.db") as store:
        found = [(step, json.loads(values)) for step, values in store.execute("SELECT step, metrics FROM metrics")]
    points = {step: values["reward/total"] for step, values in found if "reward/total" in values}
    assert points == {3: 1.5, 4: 2.0, 5: 2.5}
    tables = {step: values["samples/rollouts"] for step, values in found if "samples/rollouts" in values}
    assert set(tables) == set(SHOWN) and EVIL.split()[-1] in json.dumps(tables[3])
    assert len(list((tmp_path / "one" / "trackio").rglob("*.png"))) == 4
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    with pytest.raises(ConfigError, match="TRACKIO_SPACE_ID would send it away"):
        Trackers(load_config(None, words)).__enter__()


def test_configuration_and_command_are_parameters(tracked: Config) -> None:
    params = mlflow_runs(tracked)[0].data.params
    assert params["objective.preset"] == "gdpo" and params["rollout.samples_per_prompt"] == "8"
    assert params["command"] == "megatron-sr1 grpo 'my config.yaml' train.steps=6"
    first = next(record.run for record in wandb_records(tracked) if record.HasField("run"))
    shown = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in first.config.update}
    assert shown["objective.preset"] == "gdpo" and shown["command"] == params["command"]


def test_no_secret_and_no_machine_in_any_file(tracked: Config) -> None:
    root = Path(tracked.run_dir).parent.parent
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        assert SECRET.encode() not in data and b"/home/someone" not in data, path


def test_what_changes_when_a_run_continues_is_a_tag(folder: Path) -> None:
    off = "track.wandb.mode=disabled"
    train(config_of(folder, off), 0, 1)
    train(config_of(folder, off, "train.steps=500"), 1, 2)
    (run,) = mlflow_runs(config_of(folder))
    assert run.data.params["train.steps"] == "200" and run.data.tags["changed.train.steps"] == "500"
    assert not (folder / "ablation" / "one" / "wandb").exists()


def test_another_place_gets_a_run_of_its_own(folder: Path) -> None:
    off = "track.wandb.mode=disabled"
    train(config_of(folder, off), 0, 1)
    elsewhere = config_of(folder, off, "track.mlflow.experiment=others")
    evaluate(elsewhere, "before", 0, 0.25)
    train(elsewhere, 1, 2)
    assert [len(mlflow_runs(config)) for config in (config_of(folder), elsewhere)] == [1, 1]
    assert mlflow_points(elsewhere, "eval/accuracy") == [(0, 0.25)]


def test_without_trackers_nothing_is_imported_or_written(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_sr1.config import load_config; from megatron_sr1.metrics import *\n"
        f"config = load_config(None, ['run_dir={tmp_path}'])\n"
        "with Trackers(config) as trackers: trackers.write(0, {'loss': 1.0})\n"
        "send_evaluations(config); assert not {'wandb', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_named_at_the_start_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = config_of(tmp_path, "track.wandb.mode=disabled", "track.mlflow.uri=http://127.0.0.1:9")
    train(config, 0, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tracker mlflow: track.mlflow.uri='http://127.0.0.1:9'") and "goes on" in line
    assert len(read_jsonl(Path(config.run_dir) / "metrics.jsonl")) == 2
    assert not (Path(config.run_dir) / "trackers.json").exists(), "the next start tries again"


class _Hostile:
    """Raises or blocks where it is told to."""

    run_id = "1"

    def __init__(self, how: Callable[[], None], where: str) -> None:
        self.how, self.where = how, where
        self.do("open")

    def do(self, what: str) -> None:
        if what == self.where:
            self.how()

    def write(self, step: int, values: object) -> None:
        self.do("write")

    def show(self, step: int, name: str, rows: object) -> None:
        self.do("show")

    def finish(self, ending: str) -> None:
        self.do("finish")


@pytest.mark.parametrize("where", ["open", "write", "show", "finish"])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_tracker_that_raises_or_blocks_never_stops_a_run(
    where: str, blocks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise KeyError("of its own")

    released = threading.Event()
    how = released.wait if blocks else fail
    monkeypatch.setattr(tracking, "_open", lambda *_: _Hostile(how, where))
    for name in ("OPEN_SECONDS", "STEP_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(background, name, 1.0)
    config = config_of(tmp_path, "track.wandb.mode=disabled", "track.mlflow.uri=http://127.0.0.1:9")
    evaluate(config, "before", 0, 0.25)
    start = time.monotonic()
    train(config, 0, 9)
    assert time.monotonic() - start < 7, "it is waited for once, not at each of nine steps"
    released.set()
    said = capsys.readouterr().err.splitlines()
    assert said and all("goes on" in line and "tracker mlflow" in line for line in said)
    assert ("does not answer within 1 s" if blocks else "of its own") in said[0]
    assert len(said) == 1, said
    assert len(read_jsonl(Path(config.run_dir) / "metrics.jsonl")) == 9


def test_points_wait_for_a_server_that_goes_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException

    config = config_of(folder, "track.wandb.mode=disabled")
    with Trackers(config) as trackers:
        with monkeypatch.context() as patch:

            def refuse(*arguments: object, **keywords: object) -> None:
                raise MlflowException("away")

            patch.setattr(MlflowClient, "log_batch", refuse)
            with pytest.warns(UserWarning, match="1 wait: away"):
                trackers.write(0, {"loss": 3.0})
        trackers.write(1, {"loss": 2.0})
    assert mlflow_points(config, "loss") == [(0, 3.0), (1, 2.0)]


def test_names_of_evaluations() -> None:
    summary = {"accuracy": 0.5, "faithful": None, "n": 3, "by": {"a": 1}, "sure": True, "gap": float("nan")}
    assert evaluation_metrics("after", summary) == {"eval/accuracy": 0.5, "eval/n": 3.0}
    assert evaluation_metrics("step-50", {"leak": 0}) == {"eval/leak": 0.0}
    assert evaluation_metrics("mathverse", {"leak": 0.25}) == {"eval/mathverse/leak": 0.25}


def test_every_key_of_the_configuration_is_a_parameter() -> None:
    flat = parameters(load_config(None, ["data.train=[a.tar, b.tar]", "layout.tensor=2", "nproc=2"]))
    assert flat["data.train"] == '["a.tar", "b.tar"]' and flat["layout.tensor"] == "2" and flat["nproc"] == "2"
    assert flat["track.wandb.mode"] == "disabled" and all(type(value) is str for value in flat.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["track.wandb.mode=live"], ["track.wandb.mode='live'", "disabled, offline, online"]),
        (["track.wandb.mode=offline", "track.wandb.project="], ["track.wandb.project"]),
        (["track.mlflow.uri=./mlruns"], ["track.mlflow.uri='./mlruns'", "sqlite:///"]),
        (["track.mlflow.uri=http://me:hunter2@host"], ["track.mlflow.uri", "MLFLOW_TRACKING_PASSWORD"]),
        (["track.mlflow.uri=http://host", "track.mlflow.experiment="], ["track.mlflow.experiment"]),
    ],
)
def test_what_is_wrong_is_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert all(word in str(error.value) for word in words) and "hunter2" not in str(error.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sr1.config import tracking as configured

    track = load_config(None, ["track.wandb.mode=online", "track.mlflow.uri=sqlite:///x.db"]).track
    check_trackers(track)
    for package, key in (("wandb", "track.wandb.mode"), ("alembic", "track.mlflow.uri")):
        monkeypatch.setattr(configured, "find_spec", lambda name, gone=package: None if name == gone else object())
        with pytest.raises(ConfigError, match=rf"{key} needs {package}.*pip install 'megatron_sr1\[track\]'"):
            check_trackers(track)
    monkeypatch.setattr(configured, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"track\.trackio\.enabled needs trackio.*'megatron_sr1\[trackio\]'"):
        check_trackers(load_config(None, ["track.trackio.enabled=true"]).track)
    check_trackers(load_config(None, []).track)
