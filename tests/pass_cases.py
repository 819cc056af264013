"""Passes, images and runs that the tests of later passes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sr1.config import JudgeConfig, ObjectiveConfig, RewardsConfig
from megatron_sr1.metrics.clock import Clock
from megatron_sr1.ranks import ALONE
from megatron_sr1.streams import preset_from_config
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.step_metrics import step_metrics
from megatron_sr1.types import LaterPass, Prompt, RolloutGroup, RolloutPair, Sampling
from tests.judge_server import serve
from tests.scripted_engine import ScriptedEngine, generator, prompt
from tests.step_cases import Listed, recorder

OTHERS = [{"problem": "How many are red?", "answer": "7"}, {"problem": "Which?", "answer": "B", "choices": ["x", "y"]}]
BLIND = LaterPass("blind", "nothing")
SEEN_IMAGE = (Image.new("RGB", (28, 28)),)


class Shown:
    """An image whose pixels tell it from others."""

    size = (84, 28)

    def __init__(self, pixels: bytes) -> None:
        self.pixels = pixels

    def tobytes(self) -> bytes:
        return self.pixels


def shown(key: str, pixels: bytes, **metadata: Any) -> Prompt:
    return replace(prompt(key), images=(Shown(pixels),), metadata=metadata)  # type: ignore[arg-type]


def preset(*passes: dict[str, Any], streams: Any = (), **more: Any) -> Any:
    return preset_from_config(ObjectiveConfig(passes=list(passes), streams=list(streams), **more))


def right(question: str, attempt: int) -> str:
    return r"\boxed{1}" if "0/0/first" in question else r"\boxed{2}"


def live(folder: Path, script: Callable[[str, int], str], on_error: str = "stop", **later: Any) -> Any:
    """A step's groups, rewards and metrics, with a pass that an endpoint reads."""
    passes = [{"name": "second", "samples": 2}, {"name": "big", "reader": "endpoint", **later}]
    objective = preset(*passes, streams=[{"name": "big", "tokens": "description", "rewards": {"acc_vis@big": 1.0}}])
    how = Sampling(2, 1.0, 90, 1, later=objective.passes.later)
    with serve(script) as server:
        judge = JudgeConfig(url=server.url, model="reader", timeout=2.0, backoff=0.01, retries=1)
        rewards = RewardsConfig(judge=judge, on_error=on_error)  # type: ignore[arg-type]
        engine = generator(ScriptedEngine())
        with LiveRollouts(engine, how, recorder(objective, 2), rewards, ALONE, folder) as source:
            clock = Clock()
            prompts = [shown("a", b"1"), shown("b", b"2")]
            taken = source.take(Listed(prompts), 0, clock)  # type: ignore[arg-type]
    return objective, prompts, taken, step_metrics(taken, objective, ObjectiveConfig(), [], clock)


def bare(group: RolloutGroup) -> tuple[RolloutPair, ...]:
    return tuple(replace(pair, further=()) for pair in group.pairs)
