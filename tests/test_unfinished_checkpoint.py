"""A run that ends by a mistake while a checkpoint is written loses it only where other ranks have a part in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sr1.config import load_config
from megatron_sr1.loops.run import Run, open_run
from tests.sampled_run import Alone


class Writing:
    """Of `Checkpointer`, with a checkpoint in the making."""

    def __init__(self, *, fails: bool = False) -> None:
        self.said: list[str] = []
        self.is_writing, self._fails = True, fails

    def settle(self) -> None:
        self.said.append("settled")
        if self._fails:
            raise ValueError("no space left")

    def let_go(self, seconds: float) -> None:
        self.said.append("let go")


@pytest.mark.parametrize(("num_ranks", "said"), [(1, ["settled", "let go"]), (2, ["let go"])])
@pytest.mark.parametrize("error", [ValueError("a damaged file"), KeyboardInterrupt(), None])
def test_what_is_being_written_is_finished(
    num_ranks: int, said: list[str], error: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = Writing()
    monkeypatch.setattr(Run, "checkpoints", writing)
    config = load_config(None, [f"run_dir={tmp_path}", "watchdog.enabled=false"])
    platform: Any = SimpleNamespace(world_size=num_ranks, is_main=True, on_cpu=True, ranks=Alone())
    if error is None:
        with open_run(config, platform, "grpo"):
            pass
        assert writing.said == ["let go"]
        return
    with pytest.raises(type(error)), open_run(config, platform, "grpo"):
        raise error
    assert writing.said == said


def test_the_mistake_is_told_whatever_becomes_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Run, "checkpoints", Writing(fails=True))
    config = load_config(None, [f"run_dir={tmp_path}", "watchdog.enabled=false"])
    platform: Any = SimpleNamespace(world_size=1, is_main=True, on_cpu=True, ranks=Alone())
    with pytest.raises(ValueError, match="the first"), open_run(config, platform, "grpo"):
        raise ValueError("the first")
    assert capsys.readouterr().out.splitlines()[1:] == ["no space left"], "behind how long the ranks took"
