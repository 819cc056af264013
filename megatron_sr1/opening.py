"""The block of the answer that a chat template opens: thinking models have `<think>` at the end of the prompt, so that
a response begins inside it, and holds `</think>` alone. A block that is empty and closed, which tells a model not to
think, is a part of the prompt: the response has the layout of an instruct model's."""

from __future__ import annotations

import re

from megatron_sr1.types import Turn

_TAG = r"<([A-Za-z][\w -]*)>"
_ROLE = re.compile(rf"<\|im_start\|>\s*assistant\s*(?:{_TAG}\s*</\1>|({_TAG}))?")
_SHIPPED = (  # `prompts.own` has them
    "Set objective.template=thinking (thinking_cot where no description is asked for), objective.second_template="
    "thinking_reasoner and objective.plain_template=thinking_cot; demonstrations name these, too. Or take "
)


def opened_block(rendered: str, whose: str) -> str:
    """The tag that stands open behind the role; "" where none does.

    Args:
        rendered: the answer's turn as the chat template begins it.
        whose: chat template it is, for the message.

    Raises:
        ValueError: it is no turn of the assistant, or has more than a tag or an empty block.
    """
    opening = rendered.strip()
    role = _ROLE.fullmatch(opening)
    if role is None:
        raise ValueError(
            f"{whose} opens the answer's turn with {opening!r}, not with <|im_start|>assistant alone: responses would "
            "not have the layout that the rewards look for. Use the chat template of the instruct model, or one that "
            "prefills no more than a tag or an empty block."
        )
    return role[2] or ""


def check_known(opened: str, turn: Turn, whose: str) -> None:
    """
    Raises:
        ValueError: the chat template opens another block than the turn's template says: layouts and segments would be
            looked for in the wrong place.
    """
    if turn.opens == opened:
        return
    named = f"the template {turn.template!r}"
    if opened:
        take = _SHIPPED if opened == "<think>" else "Take "
        raise ValueError(
            f"{whose} begins the answer with {opened}, and {named} does not know it. {take}a template of your own "
            f"whose first tag is {opened}, with opens: {opened}, or use the chat template of the instruct model."
        )
    raise ValueError(
        f"{named} has opens: {turn.opens}, and {whose} begins no answer with it. Take a template without opens, such "
        "as see_think, cot and caption_reasoner, or use the model whose chat template does."
    )
