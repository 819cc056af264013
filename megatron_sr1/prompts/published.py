r"""The prompts of the published Vision-SR1 checkpoints, word for word: they belong to the weights.

Source: the paper, arXiv 2508.19652, appendix B.1, and its released code, github.com/zli12321/Vision-SR1 at
4480e0802d67670e01fcb403ff579bdb9b3337f5:

    vision_sr1            train_examples/format_prompt/see_think_format.jinja
    vision_sr1_cot        train_examples/format_prompt/cot_format.jinja, which text benchmarks are asked by, too
    vision_sr1_reasoner   verl/trainer/ray_trainer.py, ABS_Verify_Prompt

There (verl/utils/dataset.py) the image stands behind the question and in front of the instruction, no system prompt is
given, and the three breaks of see_think_format.jinja are a backslash and an n, since jinja reads no escapes; those of
ABS_Verify_Prompt are line breaks.
"""

from __future__ import annotations

from megatron_sr1.prompts.template import Template

VISION_SR1 = Template(
    "vision_sr1",
    "{problem}{images} You are tasked with analyzing an image/video to generate a detailed description to help you "
    "answer the question. First analyze the image/video and produce a self-contained description—detailed enough that "
    "can lead to the correct answer. Wrap the entire description in <description> </description> tags.\\n Next, engage "
    "in an internal dialogue and include self-reflection or verification in your reasoning process. Provide your "
    "detailed, step-by-step reasoning based on the image/video description information and image/video, and enclose "
    "this part within <think> </think> tags.\\n Finally, provide a single word or phrase answer to the question in "
    "\\boxed{}.\\nThe output format should be: <description> image/video description here </description> <think> "
    "reasoning process here </think> \\boxed{FINAL ANSWER here}.",
    tags=("description", "think"),
    may_be_blank=("think",),
    describes="description",
)
VISION_SR1_COT = Template(
    "vision_sr1_cot",
    "{problem}{images} You FIRST think about the reasoning process as an internal monologue and then provide the final "
    "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in "
    "\\boxed{}.",
    tags=("think",),
    may_be_blank=("think",),
)
VISION_SR1_REASONER = Template(
    "vision_sr1_reasoner",
    "Text description: {description}\nQuestion: {problem}\nYou are provided a text description of a problem and a "
    "question. Determine the answer to the question based on the text description. First provide an internal "
    "step-by-step reasoning within <think> </think> tags, then provide a single word or phrase answer in \\boxed{}.",
    tags=("think",),
    may_be_blank=("think",),
)
