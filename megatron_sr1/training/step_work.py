"""What the passes of a step have taken: operations, tokens, memory."""

from __future__ import annotations

import torch

from megatron_sr1.estimate.step_flops import step_flops
from megatron_sr1.platform.usage import memory_metrics, peak_flops
from megatron_sr1.policy import Policy
from megatron_sr1.policy.work import StepWork


def take_work(policy: Policy) -> StepWork:
    """Since it was last asked. Collective: a row of two numbers from each replica, and one from each rank."""
    forward, trained = policy.work.take()
    flops = step_flops(policy.architecture, forward, trained, policy.config.model.freeze)
    own = torch.tensor([[flops, trained.tokens]], dtype=torch.float64)
    total, tokens = policy.replicas.gather_rows(own).sum(0).tolist()
    platform = policy.platform
    card = platform.accelerator
    peak = None if card is None else peak_flops(card.name, policy.config.precision.dtype)
    memory = memory_metrics(platform.device, platform.ranks)
    return StepWork(total, int(tokens), None if peak is None else peak * platform.world_size, memory)
