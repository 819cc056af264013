"""Answered prompts whose grades one can see, for the tests of the evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_sr1.evaluation import Record, record_of
from megatron_sr1.evaluation.records import write_line
from megatron_sr1.prompts import OURS, SHIPPED
from megatron_sr1.rewards import own_rewards, score_group
from megatron_sr1.types import Prompt, Rollout, RolloutGroup, RolloutPair, TemplateName

from .data_cases import picture

MADE_OF = "0123456789abcdef"


def rollout(text: str, tokens: int = 5, finish_reason: Literal["stop", "length"] = "stop") -> Rollout:
    return Rollout("0/p/0/first", (1, 2), (3,) * tokens, text, (-0.5,) * tokens, finish_reason, 0)


def boxed(answer: str) -> str:
    return rf"<think> t </think> \boxed{{{answer}}}"


def pair(answer: str, description: str | None, second: str | None, tokens: int = 5) -> RolloutPair:
    """A see-think sample that answers `answer`; `second` is what the second pass answers."""
    block = "" if description is None else f"<description> {description} </description> "
    again = None if second is None else rollout(boxed(second), 3)
    return RolloutPair(0, rollout(block + boxed(answer), tokens), again, description)


def record(
    key: str,
    pairs: Sequence[RolloutPair],
    *,
    source: str = "",
    gold: str = "10",
    template: TemplateName = "see_think",
    facts: Sequence[str] | None = None,
    choices: Sequence[str] = (),
    ends_chunk: bool = False,
) -> Record:
    """Graded by the project's own rewards."""
    asked = replace(OURS, first=SHIPPED.by_name[template])
    described = asked.first.describes is not None
    images = (picture(0),) if described else ()
    metadata = {} if facts is None else {"facts": list(facts)}
    if choices:
        metadata["choices"] = list(choices)
    prompt = Prompt(key, f"Question {key}?", gold, images, source, metadata)
    group = RolloutGroup(0, prompt, tuple(pairs))
    rewards = score_group(group, own_rewards(described), asked=asked)
    return record_of(group, asked.first, rewards, MADE_OF, ends_chunk)


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Adds a chunk, as releases wrote it that had no parts."""
    with path.open("ab") as file:
        file.writelines(map(write_line, records))
