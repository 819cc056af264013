"""What may change between two starts of a run: every key of the configuration has its rule, and the rule holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from megatron_sr1.config import (
    Config,
    ConfigError,
    changes_of,
    check_epochs,
    check_resume,
    dump_config,
    load_config,
    model_fingerprint,
    saved_steps,
)
from megatron_sr1.config.resume import RULES, rule_of
from tests.hf_config_cases import SMALL, write_config

# values for keys whose neighbours by type are not allowed
OTHER: dict[str, Any] = {
    "nproc": 2,
    "layout.tensor": (2, {"nproc": 2}),
    "layout.pipeline": (2, {"nproc": 2}),
    "layout.virtual": (2, {"layout.pipeline": 2, "nproc": 2}),
    "layout.context": (2, {"nproc": 2}),
    "layout.expert": (2, {"nproc": 2}),
    "layout.stage_layers": ((3,), {}),
    "layout.gradient_bucket": 1000,
    "layout.sequence_parallel": (True, {"layout.tensor": 2, "nproc": 2}),
    "rollout.engine_tensor": (2, {"nproc": 2}),
    "rollout.max_running_requests": 7,
    "rollout.pull": True,
    "train.epochs": (2.0, {"train.steps": None}),
    "train.keep_every": 20,
    "train.keep_best": ("accuracy", {"train.evaluate_every": 10}),
    "rollout.top_p": None,  # 1 and 0 are the only values
    "rollout.top_k": None,
    "model.freeze": ("vision",),
    "model.min_pixels": 10_000,
    "model.max_pixels": 10_000,
    "recompute.modules": ("mlp",),
    "data.train_weights": ((2.0,), {}),
    "data.cold_start_weights": ((2.0,), {"data.cold_start": ("train.tar",)}),
    "optimizer.vision_lr": 2e-6,
    "optimizer.min_lr": 1e-9,
    "optimizer.schedule": "constant",
    "objective.dual_clip": 3.0,
    "objective.router_replay": "none",
    "objective.constant_tokens": 1024,
    "objective.preset": "gdpo",
    "objective.streams": ([{"name": "visual", "loss_weight": 0.25}], {}),
    "evaluate.controls": ("prior",),
    "objective.passes": [{"name": "blind", "context": "nothing"}],
    "objective.contrast": [{"name": "blind", "context": "no_image"}],
    "objective.distorted": ({"samples": 2, "strength": 0.5}, {}),
    "objective.template": "cot",
    "objective.second_template": "vision_sr1_reasoner",
    "objective.plain_template": "vision_sr1_cot",
    "model.system_prompt": "Be brief.",
    "templates": ({"mine": {"extends": "cot"}}, {}),
    "rewards.workers": 3,
    "rewards.judge.url": ("http://127.0.0.1:1", {"rewards.judge.model": "m"}),
    **{f"data.{name}_columns": {"question": "problem"} for name in ("train", "cold_start", "heldout")},
    "rewards.judge.parameters": {"temperature": 0.5},
    "objective.mismatch_low": 0.4,
    "evaluate.temperature": (1.0, {"evaluate.verify_export": 0}),
    "evaluate.samples": (2, {"evaluate.temperature": 1.0}),
    "evaluate.verify_export": 1,
    "evaluate.judge_url": ("http://127.0.0.1:1", {"evaluate.judge_model": "m"}),
    "evaluate.judge_parameters": {"temperature": 0.5},
    "rollout.engine": {"max_num_batched_tokens": 16384},
    **{f"offload.{name}": True for name in ("gradients", "optimizer", "reference")},
    "profile.steps": (0, 1),
    "profile.ranks": (0, 1),
    "objective.advantage_scope": "batch",
    "track.wandb.mode": "offline",
    "track.mlflow.uri": "sqlite:///x.db",
}


def _leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, type and default of every value of a configuration."""
    hints, defaults = get_type_hints(kind), kind()
    for field in fields(kind):
        key, default = f"{prefix}{field.name}", getattr(defaults, field.name)
        if is_dataclass(default):
            yield from _leaves(type(default), f"{key}.")
        else:
            yield key, hints[field.name], default


LENGTH = ("train.steps", "train.epochs")
LEAVES = {key: (hint, default) for key, hint, default in _leaves(Config)}


def _other(key: str) -> tuple[Any, dict[str, Any]]:
    """A value that the key may have beside its default, and what must go with it."""
    hint, default = LEAVES[key]
    if key in OTHER:
        value = OTHER[key]
        return value if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict) else (value, {})
    if isinstance(default, bool):
        return not default, {}
    if isinstance(default, str):
        choices = [choice for choice in get_args(hint) if choice != default]
        return (choices[0] if choices else f"{default}other"), {}
    if isinstance(default, tuple):
        return ("other.tar",), {}
    if default is None:
        return 1.0, {}
    return default + 1 if isinstance(default, int) else default * 0.5 + 0.25, {}


def _with(config: Config, changes: dict[str, Any]) -> Config:
    """All at once, as values that belong together must come."""
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        by_section.setdefault(section, {})[name] = value
    whole = by_section.pop("", {})
    for section, values in by_section.items():
        first, _, second = section.partition(".")
        part = getattr(config, first)
        if second:
            values = {second: replace(getattr(part, second), **values)}
        whole[first] = replace(part, **values)
    return replace(config, **whole)


@pytest.fixture
def begun(tmp_path: Path) -> Config:
    """A run that has saved three of its six steps."""
    write_config(tmp_path / "model", SMALL)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights" * 1000)
    return _begun(tmp_path, done=3)


def _begun(folder: Path, done: int) -> Config:
    settings = [f"run_dir={folder / 'run'}", f"model.hf_dir={folder / 'model'}", "data.train=[train.tar]"]
    config = load_config(None, [*settings, "train.steps=6", "optimizer.schedule=cosine", "optimizer.lr=1e-3"])
    _keep(config, done)
    return config


def _keep(config: Config, done: int) -> None:
    folder = Path(config.run_dir) / "checkpoints" / f"step_{done:06d}"
    folder.mkdir(parents=True)
    progress = {"step": done, "model_dir": config.model.hf_dir, "model": model_fingerprint(config)}
    (folder / "progress.json").write_text(json.dumps(progress))
    (Path(config.run_dir) / "config.yaml").write_text(dump_config(config))


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    assert {key: rule_of(key) for key in LEAVES}.keys() == LEAVES.keys()
    unused = [name for name in RULES if not any(key == name or key.startswith(f"{name}.") for key in LEAVES)]
    assert unused == []


@pytest.mark.parametrize("key", [key for key in LEAVES if OTHER.get(key, 0) is not None and key != "model.hf_dir"])
def test_a_change_of_any_key_is_refused_or_said(key: str, begun: Config, tmp_path: Path) -> None:
    """What takes effect is refused too where the run is finished; what is free never is."""
    value, more = _other(key)
    now = _with(begun, {key: value} | more)
    if key == "run_dir":
        assert changes_of(now) == []
        return
    change = next(change for change in changes_of(now) if change.key == key)
    finished = _with(now, {"train.steps": 3, "train.epochs": None})
    rule = rule_of(key)
    if key == "optimizer.vision_lr":  # from none: the optimizer's groups would be others
        rule = "refused"
    if rule == "refused" or key == "model.megatron_dir":
        with pytest.raises(ConfigError, match="holds another run"):
            check_resume(now)
        return
    check_resume(now)
    before = {change.key: change for change in changes_of(finished)}
    if rule == "takes effect" and key not in LENGTH:
        with pytest.raises(ConfigError, match=r"is finished.*" + key.replace(".", r"\.")):
            check_resume(finished)
    assert str(change).startswith(f"{key} was ") and (key in before or key in LENGTH)


def test_a_refusal_names_every_key_with_both_values_and_touches_nothing(begun: Config) -> None:
    kept = {path: path.read_bytes() for path in Path(begun.run_dir).rglob("*") if path.is_file()}
    now = _with(begun, {"objective.preset": "gdpo", "seed": 7, "optimizer.lr": 1e-6})
    with pytest.raises(ConfigError, match=r"seed was 1 and is 7; objective\.preset was 'vision_sr1' and is 'g") as got:
        check_resume(now)
    assert "optimizer.lr" not in str(got.value)
    assert kept == {path: path.read_bytes() for path in Path(begun.run_dir).rglob("*") if path.is_file()}


def test_a_finished_run_is_extended_by_more_steps_alone(begun: Config) -> None:
    finished = _with(begun, {"train.steps": 3})
    (Path(begun.run_dir) / "config.yaml").write_text(dump_config(finished))
    check_resume(finished)
    check_resume(_with(finished, {"rollout.sleep": False, "data.workers": 3}))
    with pytest.raises(ConfigError, match=r"is finished.*optimizer\.lr was 0\.001 and is 1e-06"):
        check_resume(_with(finished, {"optimizer.lr": 1e-6}))
    check_resume(_with(finished, {"optimizer.lr": 1e-6, "train.steps": 9}))
    with pytest.raises(ConfigError, match=r"train\.steps=2 is not allowed: .* has done 3 steps"):
        check_resume(_with(finished, {"train.steps": 2}))


def test_epochs_end_a_run_as_steps_do(begun: Config) -> None:
    """The size of a step must be that of all before: else nobody knows from their number what was seen."""
    kept, size = Path(begun.run_dir) / "config.yaml", "train.batch_size"
    by_epochs = _with(begun, {"train.steps": None, "train.epochs": 2.0})
    check_resume(by_epochs)
    with pytest.raises(ConfigError, match=r"may not all be of one size: train\.epochs was None and is 2\.0"):
        check_epochs(by_epochs, 6, size)
    kept.write_text(dump_config(by_epochs))
    check_epochs(by_epochs, 6, size)
    check_epochs(_with(by_epochs, {"optimizer.lr": 1e-6, "train.epochs": 3.0}), 9, size)
    check_epochs(_with(by_epochs, {"rollout.prompts_per_step": 7}), 6, size)
    with pytest.raises(ConfigError, match=r"may not all be of one size: train\.batch_size was 128 and is 64"):
        check_epochs(_with(by_epochs, {size: 64}), 12, size)
    check_resume(_with(by_epochs, {size: 64, "train.steps": 9, "train.epochs": None}))
    with pytest.raises(ConfigError, match=r"train\.epochs=0\.5 \(2 steps\) is not allowed: .* has done 3 steps"):
        check_epochs(_with(by_epochs, {"train.epochs": 0.5}), 2, size)
    with pytest.raises(ConfigError, match=r"is finished.*optimizer\.lr was .* raise train\.epochs to go on"):
        check_epochs(_with(by_epochs, {"optimizer.lr": 1e-6}), 3, size)
    shutil.rmtree(Path(begun.run_dir) / "checkpoints")
    check_epochs(_with(by_epochs, {size: 64}), 1, size)


def test_the_model_is_compared_by_content(begun: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "node" / "copy")
    for spelling in ("model", "./model", "model/", str(tmp_path / "model"), str(tmp_path / "node" / "copy")):
        check_resume(_with(begun, {"model.hf_dir": spelling}))
    (tmp_path / "node" / "copy" / "model.safetensors").write_bytes(b"Weights" + b"weights" * 999)
    with pytest.raises(ConfigError, match=r"it began with the weights of .*, and those of .*copy' are others"):
        check_resume(_with(begun, {"model.hf_dir": str(tmp_path / "node" / "copy")}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights" * 999 + b"wEights")
    with pytest.raises(ConfigError, match="are others"):
        check_resume(begun)


@pytest.mark.parametrize("name", ["chat_template.jinja", "preprocessor_config.json", "tokenizer.json"])
def test_what_makes_prompts_and_pixels_belongs_to_the_model(begun: Config, tmp_path: Path, name: str) -> None:
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    other = _with(begun, {"model.hf_dir": str(tmp_path / "copy")})
    check_resume(other)
    (tmp_path / "copy" / name).write_text("another")
    with pytest.raises(
        ConfigError, match=r"began with the tokenizer, chat template and image processor of .* are others"
    ):
        check_resume(other)
    path = Path(begun.run_dir) / "checkpoints" / "step_000003" / "progress.json"
    progress = json.loads(path.read_text())
    path.write_text(json.dumps(progress | {"model": progress["model"][:32]}))  # of the release before
    check_resume(other)


def test_a_checkpoint_of_before_fingerprints_is_compared_by_place(begun: Config, tmp_path: Path) -> None:
    path = Path(begun.run_dir) / "checkpoints" / "step_000003" / "progress.json"
    progress = json.loads(path.read_text())
    del progress["model"]
    path.write_text(json.dumps(progress))
    check_resume(_with(begun, {"model.hf_dir": f"{tmp_path}/./model/"}))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    with pytest.raises(ConfigError, match="are others"):
        check_resume(_with(begun, {"model.hf_dir": str(tmp_path / "copy")}))


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step_000002", "step_000010", "step_000002 (copy)", "step_best", "step_000004.partial", "step_3", "x"):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [2, 10] and saved_steps(tmp_path / "none") == []


def test_a_configuration_of_another_release_is_compared_by_the_keys_that_both_know(begun: Config) -> None:
    path = Path(begun.run_dir) / "config.yaml"
    path.write_text(path.read_text().replace("seed: 1\n", "retired: 3\n").replace("  lr: 0.001\n", "  old_lr: 1\n"))
    assert [change.key for change in changes_of(begun)] == ["optimizer.lr"]
    path.write_text("- a\n- list\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not a configuration"):
        changes_of(begun)


def test_a_run_that_saved_nothing_begins_again_with_any_configuration(begun: Config) -> None:
    shutil.rmtree(Path(begun.run_dir) / "checkpoints")
    check_resume(_with(begun, {"objective.preset": "gdpo", "seed": 7}))


def test_an_accepted_run_keeps_its_configurations_and_says_what_changed(
    begun: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_sr1.loops.run import Run
    from megatron_sr1.platform import Platform

    platform, folder = Platform(torch.device("cpu"), rank=0, world_size=1), Path(begun.run_dir)
    first = (folder / "config.yaml").read_text()
    Run(begun, platform).accept()
    assert [path.name for path in folder.glob("config*")] == ["config.yaml"], "nothing has changed"
    second, third = _with(begun, {"optimizer.lr": 1e-6}), _with(begun, {"optimizer.lr": 1e-5, "data.workers": 3})
    (begun_metrics := Path(second.run_dir) / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    Run(second, platform).accept(first=1)
    assert begun_metrics.read_text() == '{"step": 0}\n', "what is redone is no more the old start's"
    Run(third, platform).accept()
    Run(third, Platform(torch.device("cpu"), rank=1, world_size=2)).accept()
    texts = {path.name: path.read_text() for path in folder.glob("config*")}
    assert texts == {"config.0.yaml": first, "config.1.yaml": dump_config(second), "config.yaml": dump_config(third)}
    assert capsys.readouterr().out.splitlines() == [
        "changed since the last start: optimizer.lr was 0.001 and is 1e-06 (takes effect)",
        "changed since the last start: data.workers was 2 and is 3 (free)",
        "changed since the last start: optimizer.lr was 1e-06 and is 1e-05 (takes effect)",
    ]
