"""Our rewards: each maps (pair, prompt) to 0.0 or 1.0; weights belong to the streams. What else is to be known of them
stands in `table.py`.

A response that was cut by the token limit is graded on what is there.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_sr1.prompts import extract_boxed, parse_reasoner, parse_see_think, render_caption_reasoner
from megatron_sr1.rewards.description import leaks
from megatron_sr1.rewards.grading import grade
from megatron_sr1.types import Prompt, Rollout, RolloutPair


def accuracy(pair: RolloutPair, prompt: Prompt, *, rounded: bool = False) -> float:
    """The last box of the first response holds the gold answer."""
    return _accuracy(pair.first, prompt, rounded)


def see_think_format(pair: RolloutPair, prompt: Prompt) -> float:
    """The first response is the See-Think layout, entirely."""
    return float(parse_see_think(pair.first.response_text) is not None)


def cot_format(pair: RolloutPair, prompt: Prompt) -> float:
    """The first response is the layout of the plain reasoning prompt, entirely."""
    return float(parse_reasoner(pair.first.response_text) is not None)


def visual_accuracy(pair: RolloutPair, prompt: Prompt, *, rounded: bool = False) -> float:
    """The last box of the second response, written from the description alone, holds the gold answer."""
    return 0.0 if pair.second is None else _accuracy(pair.second, prompt, rounded)


def visual_format(pair: RolloutPair, prompt: Prompt) -> float:
    """The second response is the reasoner layout, which has no description (method, defect 2)."""
    return 0.0 if pair.second is None else float(parse_reasoner(pair.second.response_text) is not None)


def leak(pair: RolloutPair, prompt: Prompt) -> float:
    """The description given to the second pass states the answer (method, defect 3). To be reported, or subtracted."""
    return float(leaks(pair.description, prompt))


def judged_accuracy(pair: RolloutPair, prompt: Prompt, ask: Callable[[str], str]) -> float:
    """A model behind an endpoint, given what the second pass is given, boxes the gold answer: whether the description
    suffices to another reader than the policy. A response without a box gives no answer, so it did not."""
    assert pair.description is not None, "asked for where there is one"
    answer = extract_boxed(ask(render_caption_reasoner(pair.description, prompt.problem)))
    return float(answer is not None and grade(answer, prompt.answer, prompt.choices))


def _accuracy(rollout: Rollout, prompt: Prompt, rounded: bool) -> float:
    answer = extract_boxed(rollout.response_text)
    return float(answer is not None and grade(answer, prompt.answer, prompt.choices, rounded=rounded))
