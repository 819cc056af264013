"""Segments: which characters of a response a stream credits, by name.

    response      everything the policy wrote, its end of turn included
    <tag>         a block of the template, with its tags: description, think
    answer        the last box, with its braces
    reasoning     everything that is outside the description block
    rest          everything that no other stream credits in the same pass

A block counts where its tags stand once and in order; where it does not, the segment is empty. A token that lies partly
inside belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.prompts import TAGS, Span, boxed_block, description_block, tag_block
from megatron_sr1.types import PassName, RewardStream, Template

WHOLE, REST, OUTSIDE_DESCRIPTION, ANSWER = "response", "rest", "reasoning", "answer"
_LATER_TEMPLATE: Template = "caption_reasoner"


def segments_of(pass_name: PassName, template: Template) -> tuple[str, ...]:
    """The segments that a stream may name in a pass; `template` is that of the first."""
    tags = TAGS[template if pass_name == "first" else _LATER_TEMPLATE]
    more = (OUTSIDE_DESCRIPTION,) if "description" in tags else ()
    return (WHOLE, *tags, ANSWER, *more, REST)


def block_of(text: str, segment: str) -> Span | None:
    """[start, end) of a tag's block or of the answer; None where the response has none."""
    if segment == ANSWER:
        return boxed_block(text)
    return description_block(text) if segment == "description" else tag_block(text, segment)


def other_segments(stream: RewardStream, streams: Sequence[RewardStream]) -> tuple[str, ...]:
    """What the other streams of its pass credit; a stream of `rest` is left with what is in none of them."""
    return tuple(
        other.tokens for other in streams if other.trajectory == stream.trajectory and other.name != stream.name
    )
