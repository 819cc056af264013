"""Which engine generates which prompts: a function of what the data's index says of them.

What an engine learned of earlier response lengths would balance better, but a continued run has not learned it: it
would assign otherwise than the run that was stopped, and batches of other prompts change the last bits of log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_sr1.data import IndexedSample
from megatron_sr1.packing import split_for_ranks
from megatron_sr1.processor import Processor
from megatron_sr1.types import Sampling

_BYTES_PER_TOKEN = 4  # of a question; an estimate spares every rank the tokenising of all prompts


def deal_prompts(
    processor: Processor, sampling: Sampling, samples: Sequence[IndexedSample], num_engines: int
) -> list[list[int]]:
    """A `data.Deal`: places in `samples` for each engine, balanced by expected tokens, each list increasing."""
    return split_for_ranks([expected_tokens(processor, sample, sampling) for sample in samples], num_engines)


def deal_samples(processor: Processor, samples: Sequence[IndexedSample], num_replicas: int) -> list[list[int]]:
    """A `data.Deal` of demonstrations, among the replicas that train them: balanced by the tokens of their prompts."""
    return split_for_ranks([prompt_tokens(processor, sample) for sample in samples], num_replicas)


def prompt_tokens(processor: Processor, sample: IndexedSample) -> int:
    """Of a sample, about: its images' where the index has their sizes, and those of its text. No pixel is read."""
    visual = 0
    for size in sample.image_sizes or ():
        try:
            visual += processor.num_visual_tokens(size)
        except ValueError:  # whoever reads the sample says what is wrong with it
            continue
    if sample.text_tokens is not None:
        return visual + sample.text_tokens
    images = (size for kind, size in zip(sample.extensions, sample.sizes, strict=True) if kind != "json")
    return visual + (sum(sample.sizes) - sum(images)) // _BYTES_PER_TOKEN


def expected_tokens(processor: Processor, sample: IndexedSample, sampling: Sampling) -> int:
    """Tokens that an engine is expected to compute for all samples of a prompt.

        prompt + K * passes * max_response / 2, and K * text again for each later pass
        and prompt again where some siblings see noisy images

    The siblings share the first pass' prompt through the prefix cache; each has later prompts of its own, whose
    description counts as part of the response it came from. What an endpoint reads costs nothing here.
    """
    shown = len(sample.extensions) > 1  # one member is the text
    later = sampling.later if shown else ()
    seen = 2 if shown and sampling.distorted is not None else 1
    passes = 1 + sum(one.samples for one in later if one.reader != "endpoint")
    text = prompt_tokens(processor, replace(sample, image_sizes=None))
    responses = sampling.num_samples * passes * sampling.max_response_tokens // 2
    return seen * prompt_tokens(processor, sample) + sampling.num_samples * (passes - 1) * text + responses
