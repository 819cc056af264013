"""An evaluation on the scripted engine: its records, and the controls that are asked of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_sr1.config import Config, load_config
from megatron_sr1.evaluation import Record, read_records, record_of, replace_records
from megatron_sr1.evaluation.files import EvaluationFiles
from megatron_sr1.loops.control_material import material_of
from megatron_sr1.loops.controls import ask_controls
from megatron_sr1.prompts import OURS
from megatron_sr1.ranks import ALONE, Ranks
from megatron_sr1.rewards import own_rewards, score_group
from megatron_sr1.rollout.request import Generation
from megatron_sr1.types import Generator, Prompt

from .evaluation_cases import MADE_OF, boxed
from .scripted_engine import EOT, IMAGE, Letters, ScriptedEngine, generator, planner, sampling, whole

Asked = tuple[str | None, str]  # the description that is read, None: nothing; the question
_READ = re.compile(r"Description of the image: (.*)\n\n(.*)\n\nYou cannot", re.DOTALL)
_PLAIN = re.compile(r"(.*)\n\nReason ", re.DOTALL)


class Reader(ScriptedEngine):
    """Answers texts by what they say, and first passes by whose they are."""

    def __init__(self, reads: Callable[[str | None, str], str], first: Callable[[str], str] = str, limit: int = 1000):
        super().__init__(first, limit)
        self._reads = reads
        self.asked: list[Asked] = []  # in the order of the answers
        self.versions: list[int] = []  # of the weights that gave them
        self.stops_after = -1  # answers to texts; then it raises

    def step(self) -> list[Generation]:
        request_id, ids = self._queue.pop()
        text = self.prompts[request_id]
        if chr(IMAGE) in text:
            said = self._answer(request_id)
        else:
            if len(self.asked) == self.stops_after:
                raise KeyboardInterrupt
            found = _READ.match(text) or _PLAIN.match(text)
            assert found is not None, text
            given = None if found.re is _PLAIN else found[1]
            self.asked.append((given, found[found.re.groups]))
            self.versions.append(self.weight_version)
            said = boxed(self._reads(*self.asked[-1]))
        answer = (*Letters().text_ids(said), EOT)
        return [Generation(request_id, ids, answer, (-0.5,) * len(answer), "stop")]


@dataclass(frozen=True)
class OnThreads:
    """The platform of ranks that threads stand for."""

    ranks: Ranks = ALONE

    def on_main(self, work: Callable[[], Any]) -> Any:
        (result,) = self.ranks.gather([work()] if self.ranks.rank == 0 else [])
        return result

    def wait_for_all(self) -> None:
        self.ranks.gather([])


class Evaluated:
    """Prompts that were answered and recorded, in a folder."""

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        engine: Reader,
        *overrides: str,
        num_samples: int = 1,
        max_description: int = 50,
    ) -> None:
        self.files, self.said = EvaluationFiles(folder, "evaluate"), []
        self._overrides, self._max_description = overrides, max_description
        settings = self._config().evaluate
        fields, records = (settings.gold_field, settings.other_questions), []
        for group in generator(engine, max_description).generate(whole(prompts), sampling(num_samples=num_samples), 0):
            shows, asked = bool(group.prompt.images), OURS.of(group.prompt)
            material = material_of(group.prompt, *fields) if shows else None
            rewards: Any = score_group(group, own_rewards(shows), asked=asked)
            records.append(record_of(group, asked.first, rewards, MADE_OF, False, material=material))
        self.files.records.parent.mkdir(parents=True)
        replace_records(self.files.records, records)
        engine.asked.clear()
        engine.versions.clear()
        engine.prompts.clear()

    def _config(self, *overrides: str) -> Config:
        small = ("rollout.max_response_tokens=90", "rollout.max_description_tokens=50", "rollout.max_model_tokens=1000")
        return load_config(None, [*small, *self._overrides, *overrides])

    def ask(self, engine: Reader, *overrides: str, reader: str = "", ranks: Ranks = ALONE, **more: Any) -> list[Record]:
        """The records when the controls have been asked, by one engine for each rank. Collective."""
        run: Any = SimpleNamespace(
            config=self._config(*overrides),
            platform=OnThreads(ranks),
            planner=planner(engine.max_model_tokens, self._max_description),
            say=self.said.append,
        )

        def start() -> Generator:
            assert made, "an engine was started"
            return made[0]

        made = [generator(engine, self._max_description, slots=3, engines=ranks, **more)]
        ask_controls(run, start, self.files, 0, reader)
        return list(read_records(self.files.records))
