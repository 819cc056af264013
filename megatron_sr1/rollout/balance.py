"""Which engine generates which prompts: a function of the prompts alone.

What an engine learned of earlier response lengths would balance better, but a continued run has not learned it: it
would assign otherwise than the run that was stopped, and batches of other prompts change the last bits of log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.packing import split_for_ranks
from megatron_sr1.processor import Processor
from megatron_sr1.types import Prompt, Sampling

_CHARACTERS_PER_TOKEN = 3  # of a question; an estimate spares every rank the tokenising of all prompts


def assign_prompts(
    processor: Processor, prompts: Sequence[Prompt], sampling: Sampling, num_engines: int
) -> list[list[int]]:
    """Indices into `prompts` for each engine, balanced by expected tokens, each list increasing."""
    return split_for_ranks([expected_tokens(processor, prompt, sampling) for prompt in prompts], num_engines)


def expected_tokens(processor: Processor, prompt: Prompt, sampling: Sampling) -> int:
    """Tokens that an engine is expected to compute for all samples of a prompt.

        visual + text + K * passes * max_response / 2, and K * text again for each later pass

    The siblings share the first pass' prompt through the prefix cache; each has later prompts of its own, whose
    description counts as part of the response it came from. What an endpoint reads costs nothing here. No pixel is
    read.
    """
    visual = sum(processor.num_visual_tokens(image.size) for image in prompt.images)
    text = len(prompt.problem) // _CHARACTERS_PER_TOKEN
    later = sampling.passes_of(prompt).later
    passes = 1 + sum(one.samples for one in later if one.reader != "endpoint")
    responses = sampling.num_samples * passes * sampling.max_response_tokens // 2
    return visual + text + sampling.num_samples * (passes - 1) * text + responses
