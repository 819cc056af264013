"""Which response tokens each reward stream credits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sr1.processor import Processor
from megatron_sr1.prompts import description_block
from megatron_sr1.types import PassName, RewardStream, Rollout, RolloutPair, TokenSegment


def stream_masks(processor: Processor, pair: RolloutPair, streams: Sequence[RewardStream]) -> tuple[Tensor, Tensor]:
    """1.0 where a stream credits a token: [S, n] of the first pass and [S, n'] of the second, n' = 0 without one."""
    return _pass_masks(processor, pair.first, "first", streams), _pass_masks(processor, pair.second, "second", streams)


def _pass_masks(
    processor: Processor, rollout: Rollout | None, pass_name: PassName, streams: Sequence[RewardStream]
) -> Tensor:
    if rollout is None:
        return torch.zeros(len(streams), 0)
    rows = torch.zeros(len(streams), len(rollout.response_ids))
    for row, stream in zip(rows, streams, strict=True):
        if stream.trajectory == pass_name:
            row.copy_(_segment(processor, rollout, stream.tokens))
    return rows


def _segment(processor: Processor, rollout: Rollout, tokens: TokenSegment) -> Tensor:
    """[n]: 1.0 on the tokens of the segment. `reasoning` is all that is outside the description block."""
    everything = torch.ones(len(rollout.response_ids))
    if tokens == "response":
        return everything
    block = description_block(rollout.response_text)
    inside = torch.zeros(len(rollout.response_ids))
    if block is not None:
        inside = torch.tensor(processor.segment_mask(rollout.response_ids, block), dtype=torch.float32)
    return inside if tokens == "description" else everything - inside
