"""Does a right answer in the right layout earn what there is to earn? Responses are written, and graded as drawn ones.

The templates tell how a response is written, and our rewards are 1.0 at most. What a reward of a user's own gives at
most nobody knows, and a judge is not asked: these are not checked, which is said.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_sr1.preflight.rows import Row, not_checked
from megatron_sr1.prompts import Template
from megatron_sr1.rewards import REWARDS, Ungraded, Value, Vectors, find_reward, leaks
from megatron_sr1.rollout import Planner
from megatron_sr1.rollout.later import OpenReading, ask_later
from megatron_sr1.streams import Preset
from megatron_sr1.training.step_rewards import scored_rewards
from megatron_sr1.types import SECOND, LaterPass, PassName, Prompt, Reading, Rollout, RolloutGroup, RolloutPair

NAME = "gold answers"
REFUSED_SHARE = 0.5  # of the samples: so many are no odd ones, the template or the data as a whole are wrong
_FULL = ("acc", "acc_vis", "fmt", "fmt_vis", "fmt_cot")  # give 1.0 where all is right
# in place of a description, the first of them that does not state the answer; in place of everything else
_DESCRIPTIONS = ("what the image shows", "lines and colours", "a scene")
_FILLER = "as it is shown"


@dataclass(frozen=True)
class Unearned:
    """A sample whose gold answer does not earn."""

    key: str
    why: str


def gold_groups(prompts: Mapping[int, Prompt], preset: Preset, planner: Planner) -> list[RolloutGroup]:
    """A group of one sample for each prompt, by its number, whose responses of all passes give the gold answer."""
    return [RolloutGroup(number, prompt, (_gold_pair(prompt, preset, planner),)) for number, prompt in prompts.items()]


def _gold_pair(prompt: Prompt, preset: Preset, planner: Planner) -> RolloutPair:
    first = preset.asked.of(prompt).first
    description = None
    if first.describes is not None:
        description = next((text for text in _DESCRIPTIONS if not leaks(text, prompt)), _DESCRIPTIONS[0])
    text = _written(first, prompt.answer, description)
    second: Rollout | None = None
    further: list[Reading] = []
    for later in preset.passes.of(prompt).later:
        template = preset.template_of(later.name)
        for asked in ask_later(later, prompt, _context(later, prompt, description, planner)):
            answer = prompt.answer if asked.question is None else asked.question.answer
            rollout = _rollout(prompt, later.name_of(asked.number), _written(template, answer))
            if later.name == SECOND.name and asked.number == 0:
                second = rollout
            else:
                further.append(_reading(asked, rollout))
    return RolloutPair(0, _rollout(prompt, "first", text), second, description, further=tuple(further))


def _context(later: LaterPass, prompt: Prompt, description: str | None, planner: Planner) -> str | None:
    reads = later.context in ("description", "other_description")
    return description if reads else planner.given(prompt, later)


def _reading(asked: OpenReading, rollout: Rollout) -> Reading:
    return Reading(asked.later.name, asked.number, rollout, asked.context, asked.question)


def _rollout(prompt: Prompt, name: str, text: str) -> Rollout:
    return Rollout(f"gold/{prompt.key}/0/{name}", (), (), text, (), "stop", 0)


def _written(template: Template, answer: str, description: str | None = None) -> str:
    blocks = dict.fromkeys(template.tags, _FILLER)
    if template.describes is not None and description is not None:
        blocks[template.describes] = description
    return template.layout.write(blocks, answer)


# ---------------------------------------------------------------- what they earn
def known_rewards(preset: Preset) -> list[str]:
    """Those of a step that are ours, and need no judge: others are not asked about what nobody wrote."""
    return [name for name in scored_rewards(preset) if _is_ours(name)]


def unearned(
    groups: Sequence[RolloutGroup], graded: Mapping[int, Vectors | Ungraded], preset: Preset
) -> list[Unearned]:
    """The samples that do not earn all that our rewards give, by the passes that they are asked."""
    found = []
    for group in groups:
        result, prompt = graded[group.group_id], group.prompt
        if isinstance(result, Ungraded):
            found.append(Unearned(prompt.key, result.reason))
            continue
        asked = {later.name for later in preset.passes.of(prompt).later}
        measured = {name: value for name, value in result[0].items() if _is_asked(name, asked)}
        less = {name: value for name, value in measured.items() if not _is_full(value)}
        if less:
            name, value = next(iter(less.items()))
            text = _graded_text(group, name)
            why = f"sample {prompt.key!r}, answer {prompt.answer!r:.60}: {name} gives {_shown(value)} for {text!r:.200}"
            found.append(Unearned(prompt.key, why))
    return found


def gold_rows(num_samples: int, found: Sequence[Unearned], preset: Preset) -> list[Row]:
    """Of the samples of all ranks."""
    rows = [_row(num_samples, found)]
    others = [name for name in preset.rewards if not _is_ours(name) and find_reward(name).shown != "leak"]
    if others:
        why = f"what {', '.join(others)} give at most is not known here, or a judge would have to be asked"
        rows.append(not_checked("other rewards", why))
    return rows


def _row(num_samples: int, found: Sequence[Unearned]) -> Row:
    if not num_samples:
        return not_checked(NAME, "no sample could be read")
    if not found:
        return Row(NAME, "pass", f"{num_samples} gold answers in the right layout earn all that there is")
    verdict = "fail" if len(found) >= REFUSED_SHARE * num_samples else "warn"
    text = f"{len(found)} of {num_samples} gold answers do not earn it all, first {found[0].why}."
    return Row(NAME, verdict, text, "Correct the answer, the template or its answer format.")


def _is_ours(name: str) -> bool:
    """Whether the reward's full value is known, and no judge is needed."""
    return name.partition("@")[0] in _FULL and name.partition("@")[0] in REWARDS


def _is_asked(name: str, asked: Collection[PassName]) -> bool:
    reward = find_reward(name)
    return reward.of_pass == "first" or reward.later in asked


def _is_full(value: Value) -> bool:
    """Of all samples of a pass that is there."""
    return all(number == 1.0 for number in value) and bool(value) if isinstance(value, tuple) else value == 1.0


def _graded_text(group: RolloutGroup, name: str) -> str:
    """The response that the reward has looked at."""
    reward, (pair,) = find_reward(name), group.pairs
    if reward.of_pass == "first":
        return pair.first.response_text
    return next((reading.rollout.response_text for reading in pair.readings(reward.later)), "")


def _shown(value: Value) -> str:
    return "nothing, as its pass is not there" if value == () else str(value)
