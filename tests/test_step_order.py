"""The order of a GRPO step, which decides what the memory of a rank must hold at once."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sr1.config import ConfigError, SamplesConfig, load_config
from megatron_sr1.data import Batch
from megatron_sr1.loops import grpo
from megatron_sr1.loops.run import Run, check_verification
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.platform import Platform
from megatron_sr1.ranks import ALONE
from megatron_sr1.training.step_rollouts import StepRollouts


class Recorder:
    """Whatever is called on it is noted by its name, and returns what was given for that name."""

    def __init__(self, log: list[str], **results: Any) -> None:
        self._log, self._results = log, results

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._log.append(name)
            result = self._results.get(name)
            return result(*arguments, **options) if callable(result) else result

        return call


RESULT = SimpleNamespace(skipped=False)


def steps(monkeypatch: pytest.MonkeyPatch, num_steps: int, results: list[Any], leaves_after: int) -> list[str]:
    """What two steps of a run do, until it is asked to leave."""
    log: list[str] = []

    def end_step(step: int, *_: Any, **__: Any) -> None:
        if step + 1 == leaves_after:
            raise SystemExit(75)

    run = Recorder(log, end_step=end_step)
    run.config = SimpleNamespace(  # type: ignore[attr-defined]
        objective=None,
        rollout=SimpleNamespace(prompts_per_step=1),
        train=SimpleNamespace(steps=num_steps),
        track=SimpleNamespace(samples=SamplesConfig()),
    )
    run.platform = None  # type: ignore[attr-defined]
    monkeypatch.setattr(grpo, "own_code", lambda objective, templates: {})
    run.profiler = lambda first: lambda step: nullcontext()  # type: ignore[attr-defined]
    run.kept_before = lambda *arguments: nullcontext()  # type: ignore[attr-defined]

    def take(prompts: Any, step: int, clock: Clock) -> StepRollouts:
        assert "seconds/sync" in clock.seconds or step == 0 or not results, "what the rollouts waited for"
        return StepRollouts(*[None] * 5, step=step)  # type: ignore[arg-type]

    nothing = Recorder(log, write=None)
    nothing.show = lambda step, rows: None  # type: ignore[attr-defined]
    feed, source = Recorder(log, next=Batch((), (), (), {})), Recorder(log, take=take)
    feed.metrics, feed.ranks = {}, ALONE  # type: ignore[attr-defined]

    class Within:
        def __init__(self, *arguments: Any) -> None: ...

        def __enter__(self) -> Recorder:
            return nothing

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(grpo, "metrics_of", Within)
    monkeypatch.setattr(grpo, "watch_for_stop", Within)
    monkeypatch.setattr(grpo, "take_work", lambda policy: None)
    monkeypatch.setattr(grpo, "step_metrics", lambda *arguments, **options: {})
    source.needs_room = True  # type: ignore[attr-defined]
    policy, trainer = Policy(log), Recorder(log, update=results)
    try:
        what: Any = (SimpleNamespace(templates=None), feed, policy, source, trainer, Recorder(log), None)
        grpo._steps(run, range(run.config.train.steps), *what)  # type: ignore[arg-type]
    except SystemExit:
        log.append("leave")
    return log


class Policy:
    """Notes when the trainer's state leaves."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def hf_weights(self) -> dict[str, Any]:
        return {}

    def leave_device(self) -> None:
        self._log.append("leave_device")


STEP = ["between", "next", "take", "settle_checkpoint", "update", "finish", "write", "settle", "take_bad", "end_step"]


def test_the_policy_is_saved_while_the_engines_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fall asleep at the end of `take`, and `refresh` wakes them: last of all, and not where the run ends."""
    log = steps(monkeypatch, 3, [RESULT], leaves_after=2)
    assert log == ["accept", "refresh", "before", *STEP, "leave_device", "refresh", *STEP, "leave"]


def test_without_training_there_is_nothing_to_wake_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps(monkeypatch, 2, [], leaves_after=9) == ["accept", "refresh", "before", *STEP, *STEP]


def test_an_export_is_verified_only_where_engines_answer_in_fp32() -> None:
    config = load_config(None, ["evaluate.verify_export=2"])
    check_verification(config, Platform(torch.device("cpu"), 0, 1))
    check_verification(load_config(None, []), Platform(torch.device("cuda"), 0, 1))
    with pytest.raises(ConfigError, match=r"evaluate\.verify_export=2 .* 0 on an accelerator"):
        check_verification(config, Platform(torch.device("cuda"), 0, 1))


def test_a_checkpoint_is_finished_before_an_evaluation_and_at_the_end() -> None:
    """Else it is looked at, and finished where it is written."""
    waits: list[bool] = []
    saved: list[int] = []
    settings = ["train.steps=10", "train.save_every=2", "train.evaluate_every=4"]
    run: Any = SimpleNamespace(
        config=load_config(None, settings),
        checkpoints=SimpleNamespace(settle=lambda wait: waits.append(wait)),
        _save=lambda num_done, feed, policy: saved.append(num_done),
    )
    stop: Any = SimpleNamespace(agreed=lambda: False)
    for step in range(10):
        Run.end_step(run, step, None, stop, object(), is_last=step == 9)  # type: ignore[arg-type]
    assert saved == [2, 4, 6, 8, 10]
    assert [number for number, waited in enumerate(waits, start=1) if waited] == [4, 8, 10] and len(waits) == 10
