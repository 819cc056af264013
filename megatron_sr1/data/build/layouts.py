"""What the builder asks about texts where no model counts their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sr1.data.build.samples import Question
from megatron_sr1.prompts import SHIPPED
from megatron_sr1.types import TemplateName


def boxed_answer(template: TemplateName, response: str) -> str | None:
    """The answer in the response, or None where its layout is broken."""
    parsed = SHIPPED.by_name[template].parse(response)
    return None if parsed is None else parsed.answer


@dataclass(frozen=True)
class LayoutRules:
    """`TextRules` of layouts alone: no prompt is too long."""

    @property
    def max_prompt_tokens(self) -> int | None:
        """None: no limit."""
        return None

    @property
    def tokenizer(self) -> str:
        """Nothing counts."""
        return ""

    def prompt_tokens(self, question: Question) -> tuple[int, int] | None:
        """None: not known."""
        return None

    def boxed_answer(self, template: TemplateName, response: str) -> str | None:
        """As the function of this name."""
        return boxed_answer(template, response)
