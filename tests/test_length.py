"""How long a run is: by steps, or by epochs of the data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sr1.config import ConfigError, check_resume, dump_config, load_config
from megatron_sr1.config.checks import check_length
from megatron_sr1.config.length import LENGTH_FILE, epoch_steps, known_steps
from megatron_sr1.loops.run import Run

EPOCHS = ["train.epochs=2"]


@pytest.mark.parametrize(
    ("epochs", "samples", "size", "steps"),
    [
        (1.0, 12, 4, 3),
        (1.0, 13, 4, 4),  # the last step begins the next pass
        (0.1, 30, 3, 1),  # 0.1 * 30 is more than 3 in binary
        (0.3, 10, 3, 1),
        (0.31, 10, 3, 2),
        (1e-9, 5, 4, 1),  # the first step is whole, too
        (3.0, 1, 8, 1),
        (1.0, 10**12, 1, 10**12),
    ],
)
def test_epochs_are_counted_in_whole_steps(epochs: float, samples: int, size: int, steps: int) -> None:
    assert epoch_steps(epochs, samples, size) == steps


def test_one_of_the_two_says_how_long_a_run_is(tmp_path: Path) -> None:
    assert load_config(None, []).train.steps == 200
    by_epochs = load_config(None, EPOCHS)
    assert (by_epochs.train.steps, by_epochs.train.epochs) == (None, 2.0)
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(by_epochs))
    assert load_config(path, []) == by_epochs, "what is written loads again"
    path.write_text("train: {steps: 5}\n")
    both = r"train\.epochs=2\.0 is not allowed: it must be null with train\.steps=5.*Set one of them to null"
    with pytest.raises(ConfigError, match=both):
        load_config(path, EPOCHS)
    assert load_config(path, [*EPOCHS, "train.steps=null"]) == by_epochs
    with pytest.raises(
        ConfigError, match=r"train\.epochs=None is not allowed: it must be a number with train\.steps=None"
    ):
        load_config(path, ["train.steps=null"])
    for wrong in ("0", "-1", ".nan", ".inf", "two"):
        with pytest.raises(ConfigError, match=r"train\.epochs"):
            load_config(None, [f"train.epochs={wrong}"])


def test_epochs_are_refused_where_nobody_knows_their_samples() -> None:
    cold_start = ["data.cold_start=[a.tar,b.tar]", "data.cold_start_weights=[1,2]"]
    for command, words, key in (
        ("sft", cold_start, r"data\.cold_start_weights"),
        ("grpo", ["data.train=[a.tar,b.tar]", "data.train_weights=[1,2]"], r"data\.train_weights"),
        ("grpo", ["rollout.dynamic_sampling=2"], r"rollout\.dynamic_sampling=2"),
    ):
        with pytest.raises(ConfigError, match=rf"train\.epochs=2\.0 is not allowed: it must be null with {key}"):
            check_length(command, load_config(None, [*EPOCHS, *words]))  # type: ignore[arg-type]
        check_length(command, load_config(None, words))  # type: ignore[arg-type]
    check_length("grpo", load_config(None, [*EPOCHS, *cold_start]))


def test_held_out_losses_are_for_sft_with_demonstrations() -> None:
    with pytest.raises(ConfigError, match=r"train\.heldout_every=2 .* 0 for grpo"):
        check_length("grpo", load_config(None, ["train.heldout_every=2", "data.heldout=[a.tar]"]))
    with pytest.raises(ConfigError, match=r"train\.heldout_every=2 .* 0 without data\.heldout"):
        check_length("sft", load_config(None, ["train.heldout_every=2"]))


def test_the_steps_are_told_and_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*EPOCHS, f"run_dir={tmp_path}", "train.batch_size=8", "rollout.prompts_per_step=16"]
    config, feed = load_config(None, words), SimpleNamespace(num_samples=50)
    platform: Any = SimpleNamespace(is_main=True, on_main=lambda work: work())
    status: Any = SimpleNamespace(noted=[], note=lambda **known: status.noted.append(known))
    run, its_feed = Run(config, platform, status=status), feed
    assert run.count_steps(its_feed, "train.batch_size") == 13  # type: ignore[arg-type]
    assert run.count_steps(its_feed, "rollout.prompts_per_step") == 7  # type: ignore[arg-type]
    assert "train.epochs=2 of 50 samples, train.batch_size=8: 13 steps" in capsys.readouterr().out
    assert status.noted == [{"steps": 13}, {"steps": 7}]
    assert Run(config, platform).count_steps(its_feed, "train.batch_size") == 13  # type: ignore[arg-type]
    assert not capsys.readouterr().out, "no run: what it prints may be JSON"
    check_resume(config)
    assert known_steps(tmp_path, config) is None
    (tmp_path / LENGTH_FILE).write_text('{"steps": 13}')
    assert known_steps(tmp_path, config) == 13 and known_steps(tmp_path, load_config(None, [])) == 200
    (tmp_path / LENGTH_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"length\.json is damaged"):
        known_steps(tmp_path, config)
