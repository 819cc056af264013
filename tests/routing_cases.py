"""Experts that tokens are sent to, far from what any router would choose; and transformers' routers, listened to, led
or disturbed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_sr1.types import Rollout, TokenSequence

LAYERS, CHOSEN, EXPERTS = 4, 2, 4  # of the zoo's mixture
MOST_TOKENS = 512


def choices(kind: torch.dtype = torch.uint8) -> Tensor:
    """[MOST_TOKENS, M, k]: by place in a sequence, so that what sequences begin with alike goes to the same experts."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(MOST_TOKENS, LAYERS, EXPERTS, generator=generator)
    return scores.topk(CHOSEN).indices.to(kind)


def led(sequence: TokenSequence) -> TokenSequence:
    """The sequence with these."""
    return replace(sequence, experts=choices()[: len(sequence.prompt_ids) + len(sequence.response_ids) - 1])


def with_experts(rollout: Rollout, *, brings_prompt: bool) -> Rollout:
    """The rollout with these, as an engine gives them."""
    end = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
    ids = choices()[0 if brings_prompt else len(rollout.prompt_ids) : end]
    return replace(rollout, experts=ids.contiguous().numpy().tobytes())


def _routers(model: Any) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("mlp.gate")]


@contextmanager
def transformers_routers(
    model: Any, *, given: Tensor | None = None, noise: float = 0.0, seed: int = 0
) -> Iterator[list[Tensor]]:
    """What transformers' routers choose in one forward pass, [n, k] of each layer.

    Args:
        given: [n - 1, M, k] that they choose instead, the last token aside.
        noise: standard deviation of what is added to their logits.
    """
    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)

    def heard(module: Any, inputs: Any, output: Any) -> Any:
        logits, _, ids = output
        logits = logits + noise * torch.randn(logits.shape, generator=generator)
        if noise:
            ids = logits.topk(ids.shape[1]).indices
        if given is not None:
            ids = torch.cat([given[:, len(found)].long(), ids[-1:]])
        found.append(ids)
        return logits, logits.gather(1, ids).softmax(-1), ids

    handles = [router.register_forward_hook(heard) for router in _routers(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def as_given(found: Sequence[Tensor]) -> Tensor:
    """[n - 1, M, k] uint8 of what `transformers_routers` heard."""
    return torch.stack(list(found), 1)[:-1].to(torch.uint8)


def same_experts(left: Tensor, right: Tensor) -> Tensor:
    """Share of choices that are the same, whatever their order; [..., k] each."""
    return (left.sort(-1).values == right.sort(-1).values).double().mean()
