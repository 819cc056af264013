"""Which response tokens each reward stream credits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sr1.import_path import is_import_path
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import Template
from megatron_sr1.streams import REST, WHOLE, Preset, other_segments, segments_of
from megatron_sr1.streams.segments import OUTSIDE_DESCRIPTION
from megatron_sr1.streams.spans import own_spans
from megatron_sr1.types import CutResponses, PassName, Prompt, RewardStream, Rollout, RolloutPair


@dataclass(frozen=True)
class Response:
    """A response that the policy scores, and its place among those of its sample."""

    pass_name: PassName
    number: int  # among the samples of its pass
    rollout: Rollout
    prompt: Prompt  # with the question that was asked
    template: Template  # that it answers


def scored_responses(pair: RolloutPair, prompt: Prompt, preset: Preset) -> list[Response]:
    """The first pass, and of the later passes those that a stream credits."""
    first = preset.asked.of(prompt).first
    responses = [Response("first", 0, pair.first, prompt, first)]
    for later in preset.later:
        for reading in pair.readings(later.name) if preset.trains(later.name) else ():
            asked = prompt if reading.question is None else reading.question.asked_of(prompt)
            template = preset.template_of(later.name)
            responses.append(Response(later.name, reading.number, reading.rollout, asked, template))
    return responses


def response_masks(
    processor: Processor,
    response: Response,
    streams: Sequence[RewardStream],
    cut: CutResponses = "train",
    measured: Sequence[str] = (),
) -> Tensor:
    """[S + E, n]: 1.0 where a stream credits a token, 0 in the streams of other passes; then 1.0 where a segment of the
    first pass that is measured has it.

    Args:
        cut: "mask": nothing of a response that the token limit cut (overlong filtering: DAPO, arXiv 2503.14476, 3.4).
        measured: the E segments.
    """
    rollout = response.rollout
    rows = torch.zeros(len(streams) + len(measured), len(rollout.response_ids))
    if cut == "mask" and rollout.finish_reason == "length":
        return rows
    for row, stream in zip(rows, streams, strict=False):
        if stream.trajectory == response.pass_name:
            row.copy_(_segment(processor, response, stream, streams))
    if response.pass_name == "first":
        names = set(segments_of(response.template))  # a prompt without images may be asked by another
        for row, segment in zip(rows[len(streams) :], measured, strict=True):
            if segment in names:
                row.copy_(_named(processor, response, segment))
    return rows


def _segment(processor: Processor, response: Response, stream: RewardStream, streams: Sequence[RewardStream]) -> Tensor:
    """[n]: 1.0 on the tokens that a stream credits."""
    if stream.tokens != REST:
        return _named(processor, response, stream.tokens)
    left = torch.ones(len(response.rollout.response_ids))
    for segment in other_segments(stream, streams):
        left = torch.minimum(left, 1.0 - _named(processor, response, segment))
    return left


def _named(processor: Processor, response: Response, segment: str) -> Tensor:
    """[n]: 1.0 on the tokens of a segment, whatever other streams credit."""
    rollout = response.rollout
    everything = torch.ones(len(rollout.response_ids))
    if segment == WHOLE:
        return everything
    if is_import_path(segment):
        spans = own_spans(segment, rollout.response_text, response.prompt)
    else:
        name = response.template.describes if segment == OUTSIDE_DESCRIPTION else segment
        block = None if name is None else response.template.block(rollout.response_text, name)
        spans = () if block is None else (block,)
    inside = torch.zeros(len(rollout.response_ids))
    for span in spans:
        mask = torch.tensor(processor.segment_mask(rollout.response_ids, span), dtype=torch.float32)
        inside = torch.maximum(inside, mask)
    return everything - inside if segment == OUTSIDE_DESCRIPTION else inside
