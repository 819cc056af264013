"""Which response tokens each reward stream credits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.processor import Processor
from megatron_sr1.prompts import OURS, Asked, Template
from megatron_sr1.streams import REST, WHOLE, other_segments
from megatron_sr1.streams.segments import OUTSIDE_DESCRIPTION
from megatron_sr1.types import CutResponses, PassName, RewardStream, Rollout, RolloutPair


def stream_masks(
    processor: Processor,
    pair: RolloutPair,
    streams: Sequence[RewardStream],
    cut: CutResponses = "train",
    asked: Asked = OURS,
) -> tuple[Tensor, Tensor]:
    """1.0 where a stream credits a token: [S, n] of the first pass and [S, n'] of the second, n' = 0 without one.

    Args:
        cut: "mask": nothing of a response that the token limit cut (overlong filtering: DAPO, arXiv 2503.14476, 3.4).
        asked: the templates of the prompt's passes, see `Asked.of`.
    """

    def masks(rollout: Rollout | None, name: PassName, template: Template) -> Tensor:
        return _pass_masks(processor, rollout, name, template, streams, cut)

    return masks(pair.first, "first", asked.first), masks(pair.second, "second", asked.second)


def _pass_masks(
    processor: Processor,
    rollout: Rollout | None,
    pass_name: PassName,
    template: Template,
    streams: Sequence[RewardStream],
    cut: CutResponses,
) -> Tensor:
    if rollout is None:
        return torch.zeros(len(streams), 0)
    rows = torch.zeros(len(streams), len(rollout.response_ids))
    if cut == "mask" and rollout.finish_reason == "length":
        return rows
    for row, stream in zip(rows, streams, strict=True):
        if stream.trajectory == pass_name:
            row.copy_(_segment(processor, rollout, template, stream, streams))
    return rows


def _segment(
    processor: Processor, rollout: Rollout, template: Template, stream: RewardStream, streams: Sequence[RewardStream]
) -> Tensor:
    """[n]: 1.0 on the tokens that a stream credits."""
    if stream.tokens != REST:
        return _named(processor, rollout, template, stream.tokens)
    left = torch.ones(len(rollout.response_ids))
    for segment in other_segments(stream, streams):
        left = torch.minimum(left, 1.0 - _named(processor, rollout, template, segment))
    return left


def _named(processor: Processor, rollout: Rollout, template: Template, segment: str) -> Tensor:
    """[n]: 1.0 on the tokens of a segment, whatever other streams credit."""
    everything = torch.ones(len(rollout.response_ids))
    if segment == WHOLE:
        return everything
    outside = segment == OUTSIDE_DESCRIPTION
    name = template.describes if outside else segment
    block = None if name is None else template.block(rollout.response_text, name)
    inside = torch.zeros(len(rollout.response_ids))
    if block is not None:
        inside = torch.tensor(processor.segment_mask(rollout.response_ids, block), dtype=torch.float32)
    return everything - inside if outside else inside
