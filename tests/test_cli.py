"""Bad input ends with one line that names the key, before any rank starts and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sr1.cli import main
from megatron_sr1.cli.command import one_line_for_mistakes
from megatron_sr1.config import load_config
from tests.hf_config_cases import SMALL, write_config

MODELS = Path(__file__).parent.parent / "examples" / "models"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A GRPO configuration whose shards exist."""
    for name in ("train", "heldout", "cold_start"):
        (tmp_path / f"{name}-0.tar").write_bytes(b"")
    write_config(tmp_path / "model", SMALL)
    path = tmp_path / "grpo.yaml"
    shards = "\n".join(f"  {name}: ['{tmp_path}/{name}-*.tar']" for name in ("train", "heldout", "cold_start"))
    path.write_text(
        f"run_dir: {tmp_path}/run\nmodel:\n  hf_dir: {tmp_path}/model\ndata:\n{shards}\n"
        "rollout:\n  prompts_per_step: 8\ntrain:\n  batch_size: 4\n"
    )
    return path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trian.steps=3"], ["trian", "Known keys"]),
        (["train.stesp=3"], ["train.stesp", "Known keys", "steps"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["train.steps=0"], ["train.steps", "0"]),
        (["data.train=[/nowhere/*.tar]"], ["data.train", "/nowhere/*.tar"]),
        (["data.heldout=[]"], ["data.heldout"]),
        (["data.train_columns={a: b}"], ["data.train_columns", "shards alone"]),
        (["layout.tensor=3", "nproc=2"], ["nproc", "layout.tensor", "3"]),
        (["layout.tensor=8", "nproc=8"], ["layout.tensor", "8", "num_attention_heads=4"]),
        (["layout.pipeline=4", "nproc=4"], ["layout.pipeline", "4", "num_hidden_layers=2"]),
        (["model.hf_dir=/nowhere"], ["model.hf_dir", "/nowhere", "config.json"]),
        (["train.batch_size=3"], ["train.batch_size", "prompts_per_step=8"]),
        (["nproc=8", "rollout.samples_per_prompt=1"], ["train.batch_size", "8"]),
        (["objective.preset=vision_sr2"], ["objective.preset", "vision_sr1"]),
        (["rollout.max_model_tokens=64"], ["rollout.max_model_tokens", "max_response_tokens"]),
        (["rollout.temperature=0"], ["rollout.temperature"]),
        (["rollout.top_p=0.99"], ["rollout.top_p", "0.99", "log-prob"]),
        (["rollout.top_k=20"], ["rollout.top_k", "20"]),
        (["objective.mismatch=clip"], ["objective.mismatch", "truncate, mask"]),
        (["objective.mismatch_low=3"], ["objective.mismatch_low", "mismatch_high=2.0"]),
        (["--train-only"], ["--train-only and --from-rollouts"]),
        (["--from-rollouts", "/nowhere"], ["--train-only and --from-rollouts"]),
        (["--train-only", "--from-rollouts", "/nowhere"], ["--from-rollouts", "/nowhere", "not a folder"]),
        (["--rollouts-only", "--train-only", "--from-rollouts", "/tmp"], ["--rollouts-only", "exclude each other"]),
        (["steps"], ["steps", "key=value"]),
        (["train.steps=010"], ["train.steps=010", "010 without quotes is a number in YAML, in base 8"]),
        (["seed=0x10"], ["0x10 without quotes"]),
        (["run_dir=no"], ["run_dir=False", "in quotes"]),
        (["run_dir=1e5"], ["run_dir=100000.0", "in quotes"]),
        (["data.train=[/x.tar]", "data.train.1=y"], ["overrides", "contradict each other"]),
    ],
)
def test_grpo_names_the_key(
    config_file: Path, overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["grpo", str(config_file), *overrides])
    message = str(stopped.value)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"{message}\n"
    assert message.startswith("megatron-sr1 grpo: ") and "\n" not in message
    for word in words:
        assert word in message
    assert not (config_file.parent / "run").exists(), "nothing may be started or written"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no/such\.yaml"):
        main(["sft", "no/such.yaml"])


def test_dry_run_prints_a_configuration_that_loads_again(config_file: Path, tmp_path: Path) -> None:
    changes = [f"model.hf_dir={MODELS / 'Qwen2.5-VL-3B-Instruct'}", "precision.dtype=bf16", "train.steps=7"]
    changes += [f"data.train=[{two_splits(tmp_path / 'set')}]", f"data.cache_dir={tmp_path}/cache"]
    options = ["--dry-run", "--gpu-gib", "160", "--nproc", "2", *changes]
    command = [sys.executable, "-m", "megatron_sr1.cli", "grpo", str(config_file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # it starts the platform: not here
    assert done.returncode == 0, done.stderr
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout)
    config = load_config(printed, [])
    assert config == load_config(config_file, [*changes, "nproc=2"])
    assert "# training, GiB of a rank" in done.stdout
    assert f"data.train: {tmp_path}/set has the splits test, train: train is read" in done.stdout
    assert not (tmp_path / "cache").exists(), "a dry run builds nothing"


def two_splits(folder: Path) -> Path:
    folder.mkdir()
    for name in ("train", "test"):
        rows = [{"problem": f"{name} {number}?", "answer": str(number)} for number in range(3)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_are_built_before_ranks_start(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, started = two_splits(tmp_path / "set"), list[list[str]]()

    def start(*_: object, **__: object) -> None:
        started.append(sorted(path.name for path in (tmp_path / "cache" / "built").glob("*/*.tar")))

    monkeypatch.setattr("megatron_sr1.platform.run_on_ranks", start)
    monkeypatch.setattr("megatron_sr1.cli.runs.check_weights", lambda *_, **__: None)
    command = ["grpo", str(config_file), f"data.cache_dir={tmp_path}/cache", f"data.train=[{folder}]"]
    main([*command, f"data.heldout=[{folder}:test]"])
    told = capsys.readouterr().err
    assert f"data.train: {folder} has the splits test, train: train is read\n" in told
    assert told.count("building shards of") == 2 and started == [["test-00000.tar", "train-00000.tar"]]
    main([*command, f"data.heldout=[{folder}:train]"])
    told = capsys.readouterr().err
    assert "warning: 1 files of data.heldout are trained on, too" in told and "building" not in told
    assert "several splits (test, train). Say which" in refused(capsys, *command, f"data.heldout=[{folder}]")
    assert len(started) == 2


def test_a_refusal_needs_no_torch(config_file: Path) -> None:
    code = (
        "import sys; from megatron_sr1.cli import main\n"
        f"try: main(['grpo', {str(config_file)!r}, '--dry-run', 'train.batch_size=3'])\n"
        "except SystemExit as stopped: assert stopped.code == 2 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_run_does_not_replace_the_model_that_it_starts_from(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tmp_path / "model", tmp_path / "sft" / "hf")
    message = refused(
        capsys, "grpo", str(config_file), f"run_dir={tmp_path}/sft", f"model.hf_dir={tmp_path}/model/../sft/hf"
    )
    assert "and would replace" in message and "Choose another run_dir" in message
    for run in (config_file, config_file / "run"):
        assert f"{config_file} is a file" in refused(capsys, "preflight", str(config_file), f"run_dir={run}")


def test_a_report_replaces_no_file_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert "Name it .html" in refused(capsys, "report", str(tmp_path), "--out", str(tmp_path / "metrics.jsonl"))
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"


def test_report_of_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no run"):
        main(["report", str(tmp_path)])


# ---------------------------------------------------------------- one line, whatever the mistake
def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says before it ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and message.startswith("megatron-sr1 "), message
    return message


@pytest.mark.parametrize(
    ("variables", "overrides", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, ["nproc=2"], ["WORLD_SIZE=1", "contradicts nproc=2", "env -u RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "4"}, ["--nproc", "2"], ["WORLD_SIZE=4", "contradicts nproc=2"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, [], ["RANK='2'"]),
        ({"SLURM_STEP_NUM_TASKS": "2"}, [], ["SLURM_JOB_ID is not set, but SLURM_STEP_NUM_TASKS=2 is"]),
    ],
)
def test_ranks_that_contradict_nproc_are_refused(
    variables: dict[str, str],
    overrides: list[str],
    words: list[str],
    config_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **variables}.items():
        monkeypatch.setenv(name, value)
    message = refused(capsys, "grpo", str(config_file), *overrides)
    assert all(word in message for word in words), message


def test_a_world_of_ranks_counts_where_nproc_is_not_set(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "nproc=2" in refused(capsys, "grpo", str(config_file), "layout.tensor=3")


def test_files_are_named(tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole.yaml"
    whole.write_text(config_file.read_text())
    message = refused(capsys, "report", str(tmp_path), "--out", str(tmp_path / "x.html"))
    assert "holds no run" in message
    config_file.write_text("train:\n\tsteps: 3\n")
    assert f"{config_file}, line 2: " in refused(capsys, "sft", str(config_file))
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    message = refused(capsys, "grpo", str(whole))
    assert "LlavaForConditionalGeneration is not supported" in message


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000, '{"architectures": 3}', ""])
def test_a_broken_config_json_is_named(
    text: str, tmp_path: Path, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{tmp_path}/model/config.json" in refused(capsys, "grpo", str(config_file))


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(28, "No space left on device"), 2, ["No space left on device.", "Make room"]),
        (FileNotFoundError(2, "No such file or directory", "/a/b"), 2, ["/a/b: No such file", "Correct the path"]),
        (TimeoutError("the judge is silent"), 2, ["the judge is silent"]),
        (ValueError("two\nlines"), 2, ["two lines"]),
        (ValueError(), 2, ["ValueError"]),
        (KeyboardInterrupt(), 75, ["interrupted", "goes on from what is saved"]),
    ],
)
def test_expected_errors_become_a_line(
    error: BaseException, status: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_for_mistakes("grpo"):
        raise error
    message = capsys.readouterr().err
    assert stopped.value.code == status and message.startswith("megatron-sr1 grpo: ") and message.count("\n") == 1
    assert all(word in message for word in words), message


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_for_mistakes("grpo"):
        raise ZeroDivisionError


def test_ctrl_c_while_the_command_itself_is_imported_ends_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "megatron_sr1.cli.command":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "megatron_sr1.cli.command", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main(["grpo", "no.yaml"])
    assert ended.value.code == 75
    assert capsys.readouterr().err == "megatron-sr1: interrupted before anything began\n"
