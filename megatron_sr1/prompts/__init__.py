"""Templates: what the policy is asked in each pass, and what its responses are made of. Text only."""

from megatron_sr1.prompts.answers import AnswerFormat, Span, extract_boxed
from megatron_sr1.prompts.known import OURS, SHIPPED, Asked, Templates, templates_of
from megatron_sr1.prompts.layout import Layout, Parsed
from megatron_sr1.prompts.metadata import is_text, metadata_text
from megatron_sr1.prompts.own import CAPTION_REASONER, COT, SEE_THINK
from megatron_sr1.prompts.template import ANSWER, Template

__all__ = [
    "ANSWER",
    "CAPTION_REASONER",
    "COT",
    "OURS",
    "SEE_THINK",
    "SHIPPED",
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
