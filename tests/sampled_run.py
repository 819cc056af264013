"""GRPO's loop on real shards, a scripted engine and a policy that is one number: what it draws hangs on its weights."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from megatron_sr1.config import Config, load_config
from megatron_sr1.data import Quarantine, SampleFeed, SampleStream, ShardDataset, StreamState, write_shards
from megatron_sr1.loops import grpo
from megatron_sr1.loops.evaluate import NoEvaluations
from megatron_sr1.loops.run import Run
from megatron_sr1.metrics import Course, read_jsonl
from megatron_sr1.policy import StepResult
from megatron_sr1.ranks import OneRank
from megatron_sr1.rewards import Ungraded, Vectors, score_or_tell
from megatron_sr1.rewards.table import for_prompt
from megatron_sr1.rollout.request import Generation
from megatron_sr1.streams import PRESETS
from megatron_sr1.training import live_rollouts
from megatron_sr1.training.checkpointer import Progress
from megatron_sr1.training.live_rollouts import LiveRollouts
from megatron_sr1.training.rollout_files import rollouts_file, step_lines
from megatron_sr1.training.saved_rollouts import SavedRollouts
from megatron_sr1.training.step_rollouts import StepRollouts
from megatron_sr1.training.trainer import NoTrainer
from megatron_sr1.types import Prompt, RolloutGroup
from tests.data_cases import prompts
from tests.scripted_engine import EOT, Letters, ScriptedEngine, generator, sampling
from tests.step_cases import recorder

PRESET = PRESETS["vision_r1"]
RIGHT, WRONG, DRAWN = 0, 1, 2  # what the number of a prompt says of its answers, modulo 4; 3 is DRAWN, too
SAMPLES = 2


def texts(num: int, which: Callable[[int], bool] = lambda i: True) -> list[Prompt]:
    """Questions without images; prompt i is answered as its number says."""
    return [replace(prompt, images=()) for i, prompt in enumerate(prompts(4 * num)) if which(i)][:num]


class Answering(ScriptedEngine):
    """Half of the prompts are always right or always wrong; the others hang on the seed and on the weights."""

    weights = 0

    def update_weights(self, weights: Any, version: int) -> None:
        super().update_weights(weights, version)
        self.weights = dict(weights)["number"]

    def step(self) -> list[Generation]:
        request_id, ids = self._queue.pop()
        self.log.append(f"end {request_id}")
        found = re.search(r"Frage (\d+)", self.prompts[request_id])
        assert found is not None
        number = int(found[1])
        drawn = hashlib.sha256(f"{self.draws[request_id].seed} {self.weights}".encode()).digest()[0] % 2
        right = {RIGHT: 1, WRONG: 0}.get(number % 4, drawn)
        text = rf"<think> {self.draws[request_id].seed % 97} </think> \boxed{{{number if right else -1}}}"
        answer = (*Letters().text_ids(text), EOT)
        return [Generation(request_id, ids, answer, (-0.5,) * len(answer), "stop")]


class Here:
    """`Graders` in this process, which cannot grade what is `spoiled`."""

    ask = ask_early = None  # no endpoint is asked

    def __init__(self, names: Sequence[str], *arguments: Any, **options: Any) -> None:
        self._names, self._shares, self._by = names, {}, options["asked"]

    def submit(self, group: RolloutGroup) -> None:
        names = for_prompt(self._names, bool(group.prompt.images))
        assert group.group_id not in self._shares
        spoiled = "spoiled" in group.prompt.metadata
        self._shares[group.group_id] = (
            Ungraded("it is spoiled") if spoiled else score_or_tell(group, names, asked=self._by.of(group.prompt))
        )

    def collect(self) -> list[tuple[int, Vectors | Ungraded]]:
        shares, self._shares = list(self._shares.items()), {}
        return shares

    def readings(self) -> list[Any]:
        return []

    def close(self) -> None: ...


class Spoiling:
    """A generator that hands on groups that cannot be graded: those that `which` says, by the step, the number of the
    call in it, and the place of the group in the call."""

    def __init__(self, made: Any, which: Callable[[int, int, int], bool]) -> None:
        self._made, self._which = made, which
        self._calls: Counter[int] = Counter()

    def generate(
        self, prompts: Any, sampling: Any, step: int, on_group: Any, on_question: Any = None
    ) -> list[RolloutGroup]:
        call = self._calls[step]
        self._calls[step] += 1

        def spoiled(group: RolloutGroup) -> None:
            place = group.group_id
            more = {"spoiled": True} if self._which(step, call, place) else {}
            on_group(replace(group, prompt=replace(group.prompt, metadata={**group.prompt.metadata, **more})))

        return self._made.generate(prompts, sampling, step, spoiled)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


class Alone(OneRank):
    def any(self, value: bool) -> bool:
        return value

    def meet(self) -> None: ...


class Number:
    """A policy and its trainer: every bit of what it is trained on goes into its number."""

    def __init__(self, number: int = 0, bad: Callable[[int], bool] = lambda step: False) -> None:
        """`bad`: whether the gradient of a step is not finite."""
        self.number, self._bad = number, bad
        self.trained: list[list[tuple[int, str]]] = []  # of each step: places and keys

    def hf_weights(self) -> dict[str, int]:
        return {"number": self.number}

    def leave_device(self) -> None: ...

    def return_to_device(self) -> None: ...

    def update(self, rollouts: StepRollouts) -> list[StepResult]:
        ledger, places = rollouts.trained
        chosen = list(zip(places, ledger.number.tolist(), strict=True))
        self.trained.append([(place, rollouts.prompts.keys[number]) for place, number in chosen])
        if self._bad(rollouts.step):
            return [StepResult({}, math.nan, 1.0, skipped=True, culprits=((rollouts.trained_keys[0], 1),))]
        pairs = {group.group_id: group.pairs for group in rollouts.groups}
        firsts = [(place, pair.first) for place, number in chosen for pair in pairs[number]]
        seen = [(place, first.rollout_id, first.prompt_ids, first.response_ids) for place, first in firsts]
        values = [(name, value.tolist()) for name, value in sorted(ledger.rollout_rewards.items())]
        digest = hashlib.sha256(f"{self.number} {seen} {values}".encode()).digest()
        self.number = int.from_bytes(digest[:7], "little")
        return [StepResult({"loss/answer/policy": float(self.number)}, grad_norm=1.0, learning_rate=1.0)]


@dataclass(frozen=True)
class NumberRun(Run):
    """Keeps its checkpoints in a dictionary."""

    kept: dict[int, tuple[int, Progress]] = field(default_factory=dict)

    @cached_property
    def checkpoints(self) -> Any:
        def save(policy: Number, progress: Progress, hf: None) -> None:
            self.kept[progress.step] = (policy.number, progress)
            made.last = progress.step

        steps = {"steps": lambda: sorted(self.kept), "settle": lambda wait=True: None}
        made = SimpleNamespace(save=save, is_writing=False, last=None, **steps)
        return made

    @cached_property
    def progress(self) -> Progress | None:
        return self.kept[max(self.kept)][1] if self.kept else None

    def accept(self, *arguments: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def _fingerprint(self) -> str:
        return ""


class Runs:
    """Runs in one folder, one after the other, on the same shards."""

    def __init__(
        self,
        folder: Path,
        patch: pytest.MonkeyPatch,
        data: Sequence[Prompt],
        *settings: str,
        how: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`how`: of `Sampling`, beyond what all runs have."""
        patch.setattr(live_rollouts, "Graders", Here)
        patch.setattr(grpo, "take_work", lambda policy: None)
        self._how = how
        self.folder = folder
        self._dataset = ShardDataset(write_shards(data, folder / "data", "train", 7))
        fixed = ("rollout.prompts_per_step=4", f"rollout.samples_per_prompt={SAMPLES}", "train.batch_size=2")
        self._settings = (*fixed, "objective.preset=vision_r1", "train.steps=6", "train.save_every=2", *settings)
        self.kept: dict[str, dict[int, tuple[int, Progress]]] = {}

    def config(self, name: str, *settings: str) -> Config:
        return load_config(None, [*self._settings, f"run_dir={self.folder / name}", *settings])

    def go(
        self,
        name: str,
        *settings: str,
        engine: ScriptedEngine | None = None,
        saved: str | None = None,
        trains: bool = True,
        skips: bool = False,
        wrapped: Callable[[Any], Any] = lambda made: made,
        bad: Callable[[int], bool] = lambda step: False,
        how: Mapping[str, Any] | None = None,
    ) -> Number:
        """Goes on with the run of this name, or begins it; `saved` names the run whose rollouts it is trained from."""
        config = self.config(name, *settings, *(["rewards.on_error=skip_group"] if skips else []))
        platform: Any = SimpleNamespace(is_main=True, ranks=Alone(), rank=0, device=None)
        run = NumberRun(config, platform, kept=self.kept.setdefault(name, {}))
        first = max(run.kept, default=0)
        policy: Any = Number(run.kept[first][0] if first else 0, bad)
        feed = SampleFeed(SampleStream(self._dataset, config.seed, window=8), Quarantine(0))
        if first:
            feed.restore(StreamState.from_json(run.kept[first][1].stream))
        source: Any
        if saved is not None:
            source = SavedRollouts(self.folder / saved / "rollouts", recorder(PRESET, SAMPLES), run.platform.ranks)
        else:
            source = LiveRollouts(
                wrapped(generator(engine or Answering(), max_description=5)),
                sampling(num_samples=SAMPLES, template="cot", later=(), **(self._how if how is None else how)),
                *(recorder(PRESET, SAMPLES), config.rewards, run.platform.ranks, run.folder / "rollouts"),
                objective=config.objective,
                rounds=config.rollout.dynamic_sampling,
            )
        trainer: Any = policy if trains else NoTrainer()
        with feed, source:
            length = config.train.steps
            assert length is not None
            steps, course = range(first, length), Course(length)
            grpo._steps(run, steps, PRESET, feed, policy, source, trainer, NoEvaluations(), course)
        return policy

    def metrics(self, name: str) -> list[dict[str, float]]:
        return read_jsonl(self.folder / name / "metrics.jsonl")

    def lines(self, name: str, step: int) -> list[dict[str, Any]]:
        return step_lines(rollouts_file(self.folder / name / "rollouts", step))
