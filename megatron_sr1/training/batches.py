"""From demonstrations and scored rollouts to the packed micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sr1.config import Config, row_tokens
from megatron_sr1.objective import stream_advantages, token_kinds, token_weights
from megatron_sr1.packing import moved, pack, split_for_ranks
from megatron_sr1.processor import Processor
from megatron_sr1.prompts import templates_of
from megatron_sr1.streams import Preset
from megatron_sr1.training.segments import stream_masks
from megatron_sr1.training.tokens import ResponseTokens, into_rows
from megatron_sr1.types import (
    MicroBatch,
    Ranks,
    Rollout,
    RolloutGroup,
    SftSample,
    TokenSequence,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SftBatch:
    """This replica's share of one optimizer step's demonstrations."""

    micro_batches: list[MicroBatch]
    token_weights: list[Tensor]  # per micro-batch [R]: 1 / response tokens of the whole step


@dataclass(frozen=True)
class StreamBatch:
    """This replica's share of one optimizer step's rollouts, both passes."""

    micro_batches: list[MicroBatch]
    tokens: list[ResponseTokens]  # of each micro-batch
    num_tokens: int  # response tokens of the whole step, all replicas
    num_of_kind: Mapping[str, int]  # the same by `token_kinds`, those alone that occur


def rollout_advantages(
    groups: Sequence[RolloutGroup], rewards: Mapping[str, Tensor], preset: Preset, eps: float
) -> Tensor:
    """Advantages of a whole rollout batch, before it is cut into mini-batches: scope "batch" means all of it
    (Vision-SR1, arXiv 2508.19652, eq. 6).

    Args:
        rewards: per component [B], rollouts in the order of the groups and, within, of the samples.
        eps: see `group_advantages`.

    Returns:
        [S, B].

    Raises:
        ValueError: see `stream_advantages`.
    """
    group_ids = torch.tensor([group.group_id for group in groups for _ in group.pairs])  # [B]
    return torch.stack([stream_advantages(stream, rewards, group_ids, eps) for stream in preset.streams])


class Batcher:
    """Packs what a policy is trained on."""

    def __init__(self, config: Config, processor: Processor, replicas: Ranks, device: torch.device = CPU) -> None:
        """`device`: where the policy computes, and so where everything it is trained on goes.

        Raises:
            ConfigError: train.micro_batch_tokens has no room for a row of the layout; see `templates_of`.
        """
        self._config = config
        self._row_tokens = row_tokens(config)
        self._templates = templates_of(config)
        self._device = device
        self._processor = processor
        self._replicas = replicas

    def sft(self, samples: Sequence[SftSample]) -> SftBatch:
        """Demonstrations of any template; the response tokens are trained on, each with the same weight."""
        sequences = [self._demonstration(sample) for sample in samples]
        weight = 1.0 / sum(len(sequence.response_ids) for sequence in sequences)
        lengths = [len(sequence.prompt_ids) + len(sequence.response_ids) for sequence in sequences]
        micro_batches = self._pack([sequences[index] for index in self._mine(lengths)])
        weights = [torch.full((len(batch.targets),), weight, device=self._device) for batch in micro_batches]
        return SftBatch(micro_batches, weights)

    def streams(self, groups: Sequence[RolloutGroup], advantages: Tensor, preset: Preset) -> StreamBatch:
        """Advantages and weights of every response token in every stream.

        Args:
            groups: all groups of the optimizer step, the same on every rank.
            advantages: [S, B], rollouts in the order of the groups and, within, of the samples.
        """
        how = (preset.streams, self._config.objective.cut_responses)
        masks = [
            stream_masks(self._processor, pair, *how, preset.asked.of(group.prompt))
            for group in groups
            for pair in group.pairs
        ]
        num_credited = torch.stack([first.sum(1) + second.sum(1) for first, second in masks], dim=1)  # [S, B]
        counts = zip(num_credited.long(), preset.streams, strict=True)
        weights = torch.stack([token_weights(count, stream.aggregation) for count, stream in counts])  # [S, B]

        sequences: list[TokenSequence] = []
        responses: list[ResponseTokens] = []
        for group, start in self._my_groups(groups):
            images = tuple(self._processor.encode_image(image) for image in group.prompt.images)
            for index, pair in enumerate(group.pairs, start):
                for response, mask, seen in ((pair.first, masks[index][0], images), (pair.second, masks[index][1], ())):
                    if response is not None:
                        sequences.append(TokenSequence(response.prompt_ids, response.response_ids, seen))
                        responses.append(
                            ResponseTokens(
                                advantages=advantages[:, index, None].expand_as(mask),
                                token_weights=weights[:, index, None] * mask,
                                generator_logprobs=torch.tensor(response.generator_logprobs),
                                image_distance=self._image_distance(response),
                            )
                        )
        micro_batches = self._pack(sequences)
        tokens = [row.moved(self._device) for row in into_rows(responses, micro_batches)]
        rollouts = _rollouts(groups)
        return StreamBatch(
            [self._with_grad_rows(*row, preset) for row in zip(micro_batches, tokens, strict=True)],
            tokens,
            sum(len(rollout.response_ids) for rollout in rollouts),
            self._num_of_kind(rollouts),
        )

    def _with_grad_rows(self, batch: MicroBatch, tokens: ResponseTokens, preset: Preset) -> MicroBatch:
        matters = tokens.matters(preset.streams)
        if self._config.objective.loss or matters.all():  # a loss of the user's own may look at any token
            return batch
        return replace(batch, grad_rows=torch.nonzero(matters).squeeze(1))

    def _image_distance(self, rollout: Rollout) -> Tensor:
        """[n]: how far each response token is behind the last visual token of its prompt; -1 without images."""
        offset = torch.arange(len(rollout.response_ids), dtype=torch.float32)
        behind = next(
            (n for n, i in enumerate(reversed(rollout.prompt_ids)) if i == self._processor.image_token_id), None
        )
        return torch.full_like(offset, -1.0) if behind is None else offset + behind + 1

    def _num_of_kind(self, rollouts: Sequence[Rollout]) -> dict[str, int]:
        distance = torch.cat([self._image_distance(rollout) for rollout in rollouts])
        offset = torch.cat([torch.arange(len(rollout.response_ids)) for rollout in rollouts])
        counts = {name: int(mask.sum()) for name, mask in token_kinds(distance, offset).items()}
        return {name: count for name, count in counts.items() if count > 0}

    def _pack(self, sequences: Sequence[TokenSequence]) -> list[MicroBatch]:
        batches = pack(
            sequences,
            max_tokens=self._row_tokens,
            row_multiple=self._config.row_multiple,
            sequence_multiple=self._config.sequence_multiple,
            image_token_id=self._processor.image_token_id,
            merge_size=self._processor.merge_size,
        )
        return [moved(batch, self._device) for batch in batches]

    def _demonstration(self, sample: SftSample) -> TokenSequence:
        template = self._templates.of_demonstration(sample)
        images = tuple(self._processor.encode_image(image) for image in sample.prompt.images)
        turn = template.render(sample.prompt.problem, len(images), sample.description)
        ids = self._processor.expand(self._processor.turn_ids(turn, len(images)), [image.grid_thw for image in images])
        return TokenSequence(ids, self._processor.response_ids(sample.response), images)

    def _mine(self, lengths: Sequence[int]) -> list[int]:
        """Which of the items of these lengths, in tokens, this replica trains on."""
        return split_for_ranks(lengths, self._replicas.num_ranks)[self._replicas.rank]

    def _my_groups(self, groups: Sequence[RolloutGroup]) -> list[tuple[RolloutGroup, int]]:
        """This replica's groups, each with the number of its first sample among all of the step. A group is never
        split: its samples share their images."""
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group.pairs))
        lengths = [
            sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in _rollouts([group]))
            for group in groups
        ]
        return [(groups[index], starts[index]) for index in self._mine(lengths)]


def _rollouts(groups: Sequence[RolloutGroup]) -> list[Rollout]:
    """Both passes of every sample, those that exist."""
    both = [rollout for group in groups for pair in group.pairs for rollout in (pair.first, pair.second)]
    return [rollout for rollout in both if rollout is not None]
