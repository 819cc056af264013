r"""Our templates, in the layouts that Vision-SR1 released.

see_think                          <description> c </description> <think> t </think> \boxed{a}
cot, caption_reasoner              <think> t </think> \boxed{a}

and, for models whose chat template begins the answer with <think>, what they write behind it:

thinking                           t </think> <description> c </description> \boxed{a}
thinking_cot, thinking_reasoner    t </think> \boxed{a}
"""

from __future__ import annotations

from megatron_sr1.prompts.template import Template

_ENDING = "between <think> and </think>. Finish with the answer alone inside \\boxed{}."

SEE_THINK = Template(
    "see_think",
    "{problem}\n\nFirst describe everything in the image that the question needs, between <description> and "
    "</description>, without answering. Then reason " + _ENDING,
    tags=("description", "think"),
    may_be_blank=("think",),
    describes="description",
)
COT = Template(
    "cot",
    "{problem}\n\nLook at the image and reason " + _ENDING,
    text_only="{problem}\n\nReason " + _ENDING,
    tags=("think",),
    may_be_blank=("think",),
)
CAPTION_REASONER = Template(
    "caption_reasoner",
    "Description of the image: {description}\n\n{problem}\n\nYou cannot see the image; use its description only. "
    "Reason " + _ENDING,
    tags=("think",),
    may_be_blank=("think",),
)

_THOUGHT = "Finish, once your reasoning is done, with the answer alone inside \\boxed{}."

THINKING = Template(
    "thinking",
    "{problem}\n\nLook at the image and reason, without writing any of the tags below. Once your reasoning is done, "
    "describe everything in the image that the question needs, between <description> and </description>, without the "
    "answer. Finish with the answer alone inside \\boxed{}.",
    tags=("think", "description"),
    may_be_blank=("think",),
    describes="description",
    opens="<think>",
)
THINKING_COT = Template(
    "thinking_cot",
    "{problem}\n\nLook at the image and reason. " + _THOUGHT,
    text_only="{problem}\n\nReason. " + _THOUGHT,
    tags=("think",),
    may_be_blank=("think",),
    opens="<think>",
)
THINKING_REASONER = Template(
    "thinking_reasoner",
    "Description of the image: {description}\n\n{problem}\n\nYou cannot see the image; use its description only. "
    "Reason. " + _THOUGHT,
    tags=("think",),
    may_be_blank=("think",),
    opens="<think>",
)
