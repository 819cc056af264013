"""The floating-point operations of a step that was done, from what its passes have computed.

Of the model alone: what is computed again in backward, and of the head's chunks, is no part of it (Narayanan et al.
2021, arXiv 2104.04473, call what is left model FLOPs). Backward takes twice a forward pass: the gradients of inputs and
those of weights. Of what is frozen the second are not taken, of a frozen tower neither; pixels have no gradient.
"""

from __future__ import annotations

from collections.abc import Collection

from megatron_sr1.estimate.flops import Flops, attention_flops, image_flops, patch_flops, sequence_flops
from megatron_sr1.policy.architecture import Architecture
from megatron_sr1.policy.work import PassWork


def pass_flops(model: Architecture, work: PassWork, *, causal: bool = True) -> Flops:
    """Of forward passes. `causal`: attention computes half of the scores of a segment with itself."""
    linear = work.tokens * sequence_flops(model, 1, 0, causal=False).language
    linear -= attention_flops(model, work.tokens)  # which one token of a sequence has with itself
    scores = work.squares * (0.5 if causal else 1.0) + work.seen
    text = Flops(linear + attention_flops(model, scores), sequence_flops(model, 0, work.scored).head)
    return sum((image_flops(model, grid).times(count) for grid, count in work.grids.items()), text)


def step_flops(
    model: Architecture, forward: PassWork, trained: PassWork, freeze: Collection[str] = (), *, causal: bool = True
) -> float:
    """Of a step of one replica.

    Args:
        forward: passes without backward: for old and reference log-probs, and contrasts.
        trained: passes with it.
        freeze: names of `model.freeze`; what a regular expression spares is not taken off.
    """
    own = pass_flops(model, trained, causal=causal)
    weights = 0 if "language" in freeze else 1
    head = sequence_flops(model, 0, trained.graded).head
    backward = Flops((1 + weights) * own.language, (1 + weights) * head)
    if "vision" not in freeze:
        pixels = sum(patch_flops(model, grid) * count for grid, count in trained.grids.items())
        backward += Flops(vision=2 * own.vision - pixels)
    return (pass_flops(model, forward, causal=causal) + own + backward).total
