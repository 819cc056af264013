"""Our rewards: each maps (pair, prompt) to 0.0 or 1.0; weights belong to the streams. What else is to be known of them
stands in `table.py`.

A response that was cut by the token limit is graded on what is there.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_sr1.prompts import Asked, Template
from megatron_sr1.rewards.description import leaks
from megatron_sr1.rewards.grading import grade
from megatron_sr1.types import Prompt, Rollout, RolloutPair


def accuracy(pair: RolloutPair, prompt: Prompt, asked: Asked, *, rounded: bool = False) -> float:
    """The last answer of the first response is the gold answer."""
    return _accuracy(pair.first, prompt, asked.first, rounded)


def first_format(pair: RolloutPair, prompt: Prompt, asked: Asked) -> float:
    """The first response is the layout that its template asks for, entirely."""
    return float(asked.first.parse(pair.first.response_text) is not None)


def visual_accuracy(pair: RolloutPair, prompt: Prompt, asked: Asked, *, rounded: bool = False) -> float:
    """The last answer of the second response, written from the description alone, is the gold answer."""
    return 0.0 if pair.second is None else _accuracy(pair.second, prompt, asked.second, rounded)


def visual_format(pair: RolloutPair, prompt: Prompt, asked: Asked) -> float:
    """The second response is the layout that its own template asks for (method, defect 2)."""
    return 0.0 if pair.second is None else float(asked.second.parse(pair.second.response_text) is not None)


def leak(pair: RolloutPair, prompt: Prompt) -> float:
    """The description given to the second pass states the answer (method, defect 3). To be reported, or subtracted."""
    return float(leaks(pair.description, prompt))


def judged_question(pair: RolloutPair, prompt: Prompt, asked: Asked) -> str | None:
    """What `judged_accuracy` asks; None where there is no description."""
    return None if pair.description is None else asked.second.as_question(prompt.problem, pair.description)


def judged_accuracy(pair: RolloutPair, prompt: Prompt, ask: Callable[[str], str], asked: Asked) -> float:
    """A model behind an endpoint, given what the second pass is given, gives the gold answer: whether the description
    suffices to another reader than the policy. A response without an answer is none, so it did not."""
    question = judged_question(pair, prompt, asked)
    assert question is not None, "asked for where there is a description"
    answer = asked.second.answer_of(ask(question))
    return float(answer is not None and grade(answer, prompt.answer, prompt.choices))


def _accuracy(rollout: Rollout, prompt: Prompt, template: Template, rounded: bool) -> float:
    answer = template.answer_of(rollout.response_text)
    return float(answer is not None and grade(answer, prompt.answer, prompt.choices, rounded=rounded))
