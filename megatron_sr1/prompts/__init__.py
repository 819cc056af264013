"""Templates: what the policy is asked in each pass, and what its responses are made of. Text only."""

from megatron_sr1.prompts.answers import AnswerFormat, Span, extract_boxed
from megatron_sr1.prompts.known import OURS, OURS_THINKING, SHIPPED, Asked, Templates, templates_of
from megatron_sr1.prompts.layout import Layout, Parsed
from megatron_sr1.prompts.metadata import is_text, metadata_text
from megatron_sr1.prompts.own import CAPTION_REASONER, COT, SEE_THINK, THINKING, THINKING_COT, THINKING_REASONER
from megatron_sr1.prompts.template import ANSWER, Template

__all__ = [
    "ANSWER",
    "CAPTION_REASONER",
    "COT",
    "OURS",
    "OURS_THINKING",
    "SEE_THINK",
    "SHIPPED",
    "THINKING",
    "THINKING_COT",
    "THINKING_REASONER",
    "AnswerFormat",
    "Asked",
    "Layout",
    "Parsed",
    "Span",
    "Template",
    "Templates",
    "extract_boxed",
    "is_text",
    "metadata_text",
    "templates_of",
]
