"""Prompts and demonstrations told apart: a shard may hold either."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sr1.types import Prompt, SftSample


def only_prompts(samples: Sequence[Prompt | SftSample], key: str) -> list[Prompt]:
    """The samples, which must all be prompts.

    Raises:
        ValueError: one is a demonstration; `key` names the configuration key of the shards.
    """
    prompts = []
    for sample in samples:
        if isinstance(sample, SftSample):
            raise ValueError(f"{key} holds the demonstration {sample.prompt.key!r}. Give shards without responses.")
        prompts.append(sample)
    return prompts


def only_demonstrations(samples: Sequence[Prompt | SftSample], key: str) -> list[SftSample]:
    """The samples, which must all be demonstrations.

    Raises:
        ValueError: one is a prompt; `key` names the configuration key of the shards.
    """
    demonstrations = []
    for sample in samples:
        if not isinstance(sample, SftSample):
            raise ValueError(f"{key} holds the prompt {sample.key!r} without a response. Give demonstrations.")
        demonstrations.append(sample)
    return demonstrations
