"""Segments: which characters of a response a stream credits, by name.

    response      everything the policy wrote, its end of turn included
    <tag>         a block of the template, with its tags: description, think
    answer        the last answer, with its braces or tags
    reasoning     everything that is outside the block that describes
    rest          everything that no other stream credits in the same pass
    file.py:name  what a function of the user's own finds, see `spans.py`

A block counts where its tags stand once and in order; where it does not, the segment is empty. A token that lies partly
inside belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.prompts import ANSWER, Template
from megatron_sr1.types import RewardStream

WHOLE, REST, OUTSIDE_DESCRIPTION = "response", "rest", "reasoning"


def segments_of(template: Template) -> tuple[str, ...]:
    """The segments that a stream may name in a pass that is asked by `template`; where a tag is called as another
    segment, neither."""
    more = () if template.describes is None else (OUTSIDE_DESCRIPTION,)
    unclear = {WHOLE, ANSWER, OUTSIDE_DESCRIPTION, REST} & set(template.tags)
    return tuple(name for name in (WHOLE, *template.tags, ANSWER, *more, REST) if name not in unclear)


def other_segments(stream: RewardStream, streams: Sequence[RewardStream]) -> tuple[str, ...]:
    """What the other streams of its pass credit; a stream of `rest` is left with what is in none of them."""
    return tuple(
        other.tokens for other in streams if other.trajectory == stream.trajectory and other.name != stream.name
    )
